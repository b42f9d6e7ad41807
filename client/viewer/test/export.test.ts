import assert from 'node:assert/strict'
import { test } from 'node:test'
import { wrapped } from '../src/browser/export'

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
