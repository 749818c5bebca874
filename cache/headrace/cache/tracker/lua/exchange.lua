-- What a node says and asks of one swarm, in one batch; packing.py has the layout of request and answer.
-- KEYS: rows, nodes, claims, digests.  ARGV: node id, numbers, chunks, then ids for `missing`, then digests.
local rows, nodes, claims, digests = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local me = ARGV[1]
local meta = call('HMGET', nodes, 'm', 'n:' .. me)
if not meta[1] or not meta[2] then return {'?'} end
local stride, epoch, blocks, used, zones, learned = struct.unpack(META, meta[1])
local slot = tonumber(meta[2])
local gained, lost, missing, freed, kept, wanted, said, budget, renew, stamp, lease, lifetime, seed =
  struct.unpack('>I2I2I2I2I2I2I2I2BBI4I4I4', ARGV[2])
local chunks = numbers(ARGV[3], gained + lost + missing + freed + kept + wanted)
local clock
local function now()
  clock = clock or milliseconds()
  return clock
end

-- Bits: what was lost or not found is cleared, what was gained is set.
local bits, n = {}, 0
local function set(chunk, column, value)
  bits[n + 1], bits[n + 2], bits[n + 3], bits[n + 4] = 'SET', 'u1', format('%d', chunk * stride + column), value
  n = n + 4
end
for i = gained + 1, gained + lost do set(chunks[i], slot, '0') end
for i = 1, missing do
  local column = call('HGET', nodes, 'n:' .. ARGV[3 + i])
  if column then set(chunks[gained + lost + i], tonumber(column), '0') end
end
for i = 1, gained do  -- as `set`: there are many
  bits[n + 1], bits[n + 2], bits[n + 3], bits[n + 4] = 'SET', 'u1', format('%d', chunks[i] * stride + slot), '1'
  n = n + 4
end
if n > 0 then
  call('BITFIELD', rows, unpack(bits))
  call('PEXPIRE', rows, lifetime, 'NX')  -- it may be new
end
if learned == 1 then unlearn(rows, digests, stride, chunks, gained + 1, gained + lost + missing) end

-- Claims end when they are given back; those still needed are kept, or made again.
local at = gained + lost + missing
for i = at + 1, at + freed do
  local name = format('%d', chunks[i])
  local claim = call('HGET', claims, name)
  if claim and sub(claim, 15) == me then call('HDEL', claims, name) end
end
local function free(claim)  -- or one's own
  return not claim or sub(claim, 15) == me or tonumber(sub(claim, 1, 13)) <= now()
end
local function take(name)
  call('HSET', claims, name, format('%013d %s', now() + lease, me))
end
at = at + freed
for i = at + 1, at + kept do
  local name = format('%d', chunks[i])
  if not find(row_of(rows, stride / 8, chunks[i]), '[^%z]') and free(call('HGET', claims, name)) then
    take(name)
  end
end

if said > 0 then
  for i = 4 + missing, 3 + missing + said do
    call('HSETNX', digests, format('%d', struct.unpack('>I4', ARGV[i])), sub(ARGV[i], 5))
  end
  call('PEXPIRE', digests, lifetime, 'NX')
  if learned == 0 then
    learned = 1
    call('HSET', nodes, 'm', struct.pack(META, stride, epoch, blocks, used, zones, 1))
  end
end

-- Answers: holders where there are any, else the claim while some are asked for, else who is reading.
at = at + kept
local found, parts, absent = read(rows, stride, chunks, at + 1, at + wanted, seed)
local kinds = string.rep('h', wanted)
if #absent > 0 then
  local kind, names = {}, {}
  for i = 1, wanted do kind[i] = 'h' end
  for i, place in ipairs(absent) do names[i] = format('%d', chunks[place]) end
  local claim = call('HMGET', claims, unpack(names))
  for i, place in ipairs(absent) do
    if not free(claim[i]) then
      kind[place - at] = 'r'
    elseif budget > 0 then
      budget = budget - 1
      take(names[i])
      kind[place - at] = 'c'
    else
      kind[place - at] = '-'
    end
  end
  kinds = table.concat(kind)
end
if kept > 0 or #absent > 0 then call('PEXPIRE', claims, lifetime) end
if stamp == 1 then call('HSET', nodes, 't:' .. me, format('%d', now())) end
if renew == 1 then
  for i = 1, 4 do call('PEXPIRE', KEYS[i], lifetime) end
end
local answer = {'.', struct.pack('>I4I4I4I4', stride, epoch, blocks, slot), kinds, found, parts}
if learned == 1 and wanted > 0 then
  local names = {}
  for i = 1, wanted do names[i] = format('%d', chunks[at + i]) end
  answer[6] = call('HMGET', digests, unpack(names))
end
return answer
