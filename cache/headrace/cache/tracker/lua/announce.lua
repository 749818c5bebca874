-- A node holds exactly these of a run of chunks; what it gained lately is not taken back.
-- KEYS: rows, nodes, claims, digests.  ARGV: node id, first chunk, number of chunks, bitmap, settled, lifetime.
local rows, nodes, digests = KEYS[1], KEYS[2], KEYS[4]
local meta = call('HMGET', nodes, 'm', 'n:' .. ARGV[1], 't:' .. ARGV[1])
if not meta[1] or not meta[2] then return {'?'} end
local stride, _, _, _, _, learned = struct.unpack(META, meta[1])
local first, total, have = tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local exact = not meta[3] or milliseconds() - tonumber(meta[3]) >= tonumber(ARGV[5])
local bits, n, lost = {}, 0, {}
for i = 0, total - 1 do
  local value
  if bit.band(bit.rshift(byte(have, math.floor(i / 8) + 1), i % 8), 1) == 1 then
    value = '1'
  elseif exact then
    value = '0'
    lost[#lost + 1] = first + i
  end
  if value then
    bits[n + 1], bits[n + 2], bits[n + 3], bits[n + 4] =
      'SET', 'u1', format('%d', (first + i) * stride + meta[2]), value
    n = n + 4
  end
end
if n > 0 then call('BITFIELD', rows, unpack(bits)) end
if learned == 1 then unlearn(rows, digests, stride, lost, 1, #lost) end
for i = 1, 4 do call('PEXPIRE', KEYS[i], ARGV[6]) end
return {'.'}
