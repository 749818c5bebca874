-- Give a node a column in a swarm. Rows grow when there is none free: twice as long, all of them copied.
-- KEYS: rows, nodes, the node's key, its set of swarms, deadlines, the token of the list of members.
-- ARGV: node id, record, zone, swarm's name, chunks, lifetime, lease, token, largest bitmap in bytes.
local rows, nodes = KEYS[1], KEYS[2]
local me, record, zone, lifetime, lease = ARGV[1], ARGV[2], ARGV[3], ARGV[6], tonumber(ARGV[7])
if call('EXISTS', KEYS[3]) == 0 then
  call('SET', KEYS[3], ARGV[8] .. '\n' .. record, 'PX', lease)
  call('ZADD', KEYS[5], milliseconds() + lease, me)
  call('PEXPIRE', KEYS[5], lifetime)
  call('SET', KEYS[6], ARGV[8], 'PX', lifetime)
end
call('SADD', KEYS[4], ARGV[4])
call('PEXPIRE', KEYS[4], lifetime)
if call('HEXISTS', nodes, 'n:' .. me) == 1 then return {'.'} end

local stride, epoch, blocks, used, zones, learned = 64, 0, 0, 0, 0, 0
local meta = call('HGET', nodes, 'm')
if meta then
  stride, epoch, blocks, used, zones, learned = struct.unpack(META, meta)
else
  call('DEL', rows)  -- what a swarm without members may have left
  epoch = milliseconds() % 4294967296  -- not one that nodes remember of an earlier swarm of this name
end
local owned = call('HGET', nodes, 'z:' .. zone)
if not owned and zones >= 64 then  -- the last zones share the columns of those that have none
  zone = ''
  owned = call('HGET', nodes, 'z:')
end
local free = call('HGET', nodes, 'f:' .. zone) or ''
if free == '' then
  if (blocks + 1) * 64 > stride then
    if stride >= 65536 or stride / 8 * 2 * tonumber(ARGV[5]) > tonumber(ARGV[9]) then return {'full'} end
    local old, size = call('GET', rows) or '', stride / 8
    if #old % size > 0 then old = old .. string.rep('\0', size - #old % size) end
    local wider, n, gap = {}, 0, string.rep('\0', size)
    for first = 1, #old, size do
      wider[n + 1], wider[n + 2] = sub(old, first, first + size - 1), gap
      n = n + 2
    end
    if n > 0 then call('SET', rows, table.concat(wider)) end
    stride = stride * 2
  end
  local columns = {}
  for i = 1, 64 do columns[i] = struct.pack('>I2', blocks * 64 + 64 - i) end
  free = table.concat(columns)
  if not owned then zones = zones + 1 end
  call('HSET', nodes, 'z:' .. zone, (owned or '') .. struct.pack('>I2', blocks), 'b:' .. blocks, zone)
  blocks = blocks + 1
end
local slot = struct.unpack('>I2', free, #free - 1)
call('HSET', nodes, 'f:' .. zone, sub(free, 1, #free - 2), 'n:' .. me, slot, 's:' .. slot, record,
  'm', struct.pack(META, stride, epoch, blocks, used + 1, zones, learned))
call('PEXPIRE', rows, lifetime)
call('PEXPIRE', nodes, lifetime)
return {'.'}
