-- Clear a node's column, a run of chunks at a time; after the last one the column is free for another.
-- KEYS: rows, nodes, claims, digests, the node's key, its set of swarms.
-- ARGV: node id, chunks, chunks at a time, whether the node may live, swarm's name, lifetime.
local rows, nodes, claims, digests = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local me, chunks = ARGV[1], tonumber(ARGV[2])
if ARGV[4] == '0' and call('EXISTS', KEYS[5]) == 1 then
  call('HDEL', nodes, 'r:' .. me)
  return 'alive'
end
local meta = call('HMGET', nodes, 'm', 'n:' .. me, 'r:' .. me)
if not meta[1] or not meta[2] then
  call('SREM', KEYS[6], ARGV[5])
  return 'done'
end
local stride, epoch, blocks, used, zones, learned = struct.unpack(META, meta[1])
local slot = tonumber(meta[2])
local from = tonumber(meta[3] or 0)
local to = math.min(from + tonumber(ARGV[3]), chunks)
local rows_there = math.ceil(call('STRLEN', rows) / (stride / 8))
for first = from, math.min(to, rows_there) - 1, 1000 do
  local bits, n, these = {}, 0, {}
  for chunk = first, math.min(first + 1000, to, rows_there) - 1 do
    bits[n + 1], bits[n + 2], bits[n + 3], bits[n + 4] = 'SET', 'u1', format('%d', chunk * stride + slot), '0'
    n = n + 4
    these[#these + 1] = chunk
  end
  local before = call('BITFIELD', rows, unpack(bits))
  if learned == 1 then
    for i, held in ipairs(before) do
      if held == 1 then unlearn(rows, digests, stride, these, i, i) end
    end
  end
end
if to < chunks then
  call('HSET', nodes, 'r:' .. me, to)
  return 'more'
end

if used <= 1 then
  call('DEL', rows, nodes, claims, digests)
else
  local all = call('HGETALL', claims)
  for i = 1, #all, 2 do
    if sub(all[i + 1], 15) == me then call('HDEL', claims, all[i]) end
  end
  local free = 'f:' .. (call('HGET', nodes, 'b:' .. math.floor(slot / 64)) or '')
  call('HDEL', nodes, 'n:' .. me, 's:' .. slot, 'r:' .. me, 't:' .. me)
  call('HSET', nodes, free, (call('HGET', nodes, free) or '') .. struct.pack('>I2', slot),
    'm', struct.pack(META, stride, (epoch + 1) % 4294967296, blocks, used - 1, zones, learned))
end
call('SREM', KEYS[6], ARGV[5])
return 'done'
