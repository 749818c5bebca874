-- A node lives. Answers with the token under which it is known, and with a few that live no more and that
-- nobody else is clearing up after.
-- KEYS: the node's key, deadlines, its set of swarms, the token of the list of members.
-- ARGV: node id, record, token, time to live, lifetime, start of nodes' keys, start of clearers' keys, how many.
local token = ARGV[3]
local known = call('GET', KEYS[1])
if known then token = sub(known, 1, (find(known, '\n', 1, true) or 1) - 1) end
local now = milliseconds()
local record = token .. '\n' .. ARGV[2]
if known ~= record then call('SET', KEYS[4], ARGV[3]) end
call('SET', KEYS[1], record, 'PX', ARGV[4])
call('ZADD', KEYS[2], now + ARGV[4], ARGV[1])
call('PEXPIRE', KEYS[2], ARGV[5])
call('PEXPIRE', KEYS[3], ARGV[5])
call('PEXPIRE', KEYS[4], ARGV[5])
local answer = {token}
for _, gone in ipairs(call('ZRANGEBYSCORE', KEYS[2], '-inf', now, 'LIMIT', 0, ARGV[8])) do
  if call('EXISTS', ARGV[6] .. gone) == 0 and call('SET', ARGV[7] .. gone, ARGV[1], 'NX', 'PX', 5000) then
    answer[#answer + 1] = gone
  end
end
return answer
