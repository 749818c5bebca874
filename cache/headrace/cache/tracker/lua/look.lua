-- Holders of chunks, for a node that may not belong to the swarm; changes nothing.
-- KEYS: rows, nodes, digests.  ARGV: node id, number of chunks, seed, chunks.
local meta = call('HMGET', KEYS[2], 'm', 'n:' .. ARGV[1])
if not meta[1] then return {'?'} end
local stride, epoch, blocks, _, _, learned = struct.unpack(META, meta[1])
local total = tonumber(ARGV[2])
local chunks = numbers(ARGV[4], total)
local kinds = {}
for i = 1, total do kinds[i] = 'h' end
local found, parts, absent = read(KEYS[1], stride, chunks, 1, total, tonumber(ARGV[3]))
for _, place in ipairs(absent) do kinds[place] = '-' end
local slot = tonumber(meta[2] or 4294967295)
local answer = {'.', struct.pack('>I4I4I4I4', stride, epoch, blocks, slot), table.concat(kinds), found, parts}
if learned == 1 then
  local names = {}
  for i = 1, total do names[i] = format('%d', chunks[i]) end
  answer[6] = call('HMGET', KEYS[3], unpack(names))
end
return answer
