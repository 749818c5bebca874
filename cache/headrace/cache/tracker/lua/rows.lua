-- Shared by the scripts that answer with rows; put before them.
-- meta: stride (columns of a row), epoch (of the columns' owners), blocks (of 64 columns), used (columns),
-- zones (that have blocks), learned (1: there are learned digests).
local call, byte, sub, find, format = redis.call, string.byte, string.sub, string.find, string.format
local META = '>I4I4I4I4I4B'
local LONGEST = 128  -- bytes of a row that an answer carries; longer rows are answered in part

local function row_of(rows, size, chunk)
  return call('GETRANGE', rows, format('%d', chunk * size), format('%d', chunk * size + size - 1))
end

-- The part of a long row that holds somebody, from the part `first` on, around; nil when nobody does.
local function part_of(rows, size, chunk, first)
  local start = chunk * size + first * LONGEST
  local part = call('GETRANGE', rows, format('%d', start), format('%d', start + LONGEST - 1))
  if find(part, '[^%z]') then return part, first end
  local row = row_of(rows, size, chunk)
  local at = find(row, '[^%z]', first * LONGEST + 1) or find(row, '[^%z]')
  if not at then return nil end
  first = math.floor((at - 1) / LONGEST)
  return sub(row, first * LONGEST + 1, (first + 1) * LONGEST), first
end

-- Rows of chunks[from..to]. Returns those that somebody holds (joined), which part each is (joined, for long
-- rows), and a table of the places of chunks that nobody holds.
local function read(rows, stride, chunks, from, to, seed)
  local size = stride / 8
  local found, n, parts, absent = {}, 0, {}, {}
  local width = math.min(size, LONGEST)
  local nobody = string.rep('\0', width)
  local last = size - 1
  for i = from, to do
    local row, part
    if size <= LONGEST then
      local start = chunks[i] * size
      row = call('GETRANGE', rows, format('%d', start), format('%d', start + last))
    else
      row, part = part_of(rows, size, chunks[i], (seed + i * 40503) % (size / LONGEST))
      if row then parts[#parts + 1] = string.char(part) end
    end
    if row and #row < width then row = row .. string.rep('\0', width - #row) end
    if row and row ~= nobody then  -- Lua has each string once: no bytes are compared
      n = n + 1
      found[n] = row
    else
      absent[#absent + 1] = i
    end
  end
  return table.concat(found), table.concat(parts), absent
end

local function numbers(packed, total)
  if total <= 200 then
    return {struct.unpack('>' .. string.rep('I4', total), packed)}
  end
  local all = {}
  for first = 1, total, 200 do  -- how many values one call may return is limited
    local some = math.min(200, total - first + 1)
    local part = {struct.unpack('>' .. string.rep('I4', some), packed, (first - 1) * 4 + 1)}
    for i = 1, some do all[first + i - 1] = part[i] end
  end
  return all
end

-- Forget learned digests of those of chunks[from..to] that nobody holds any more.
local function unlearn(rows, digests, stride, chunks, from, to)
  for i = from, to do
    if not find(row_of(rows, stride / 8, chunks[i]), '[^%z]') then
      call('HDEL', digests, format('%d', chunks[i]))
    end
  end
end

local function milliseconds()
  local time = call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
