import assert from 'node:assert/strict'
import { test } from 'node:test'
import { columnings, wrapped } from '../src/browser/export'

// Isolates have no width, and other characters that of a letter.
const widthOf = (text: string) => text.replace(/[\u2066-\u2069]/g, '').length

test('a text is broken at spaces', () => {
  assert.deepEqual(wrapped('The capital of Japan', 11, widthOf), ['The capital', 'of Japan'])
})

test('a script without spaces is broken between characters', () => {
  assert.deepEqual(wrapped('法国的首都是巴黎', 4, widthOf), ['法国的首', '都是巴黎'])
  assert.deepEqual(wrapped('a 12345678901 b', 6, widthOf), ['a', '123456', '78901', 'b'])
})

test('both lines of an isolated text keep its direction', () => {
  assert.deepEqual(wrapped('\u2067عاصمة فرنسا\u2069 → x', 9, widthOf), [
    '\u2067عاصمة\u2069',
    '\u2067فرنسا\u2069 → x',
  ])
})

test('rows are divided into columns of similar heights', () => {
  const divided = columnings([3, 6, 7, 1], (height) => height)
  const byNumber = new Map(divided.map((columns) => [columns.length, columns]))
  assert.deepEqual([...byNumber.keys()].sort(), [1, 2, 3, 4])
  assert.deepEqual(byNumber.get(2), [
    [3, 6],
    [7, 1],
  ])
  assert.deepEqual(byNumber.get(3), [[3], [6], [7, 1]])
  assert.deepEqual(
    columnings([5], (height) => height),
    [[[5]]],
  )
})
