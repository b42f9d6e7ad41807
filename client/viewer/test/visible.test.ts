import assert from 'node:assert/strict'
import { test } from 'node:test'
import {
  cut,
  directionOf,
  fitted,
  fromBase64,
  piecesOf,
  tokenOf,
  visible,
} from '../src/model/tokens'
import { at } from '../src/presentation/wording'
import cases from './labels.json'

for (const { text, raw, shown } of cases as { text: string; raw?: string; shown: string }[]) {
  test(`${JSON.stringify(text)} is shown as ${JSON.stringify(shown)}`, () => {
    assert.equal(visible(text, fromBase64(raw ?? '')), shown)
  })
}

test('a label is cut between graphemes, never inside one', () => {
  assert.equal(cut('abcdef', 4), 'abc…')
  assert.equal(cut('abcd', 4), 'abcd')
  assert.equal(cut('e\u0301e\u0301e\u0301', 2), 'e\u0301…')
})

test('a right-to-left token is isolated within other text', () => {
  const prompt = ['مدينة', 'שלום', '␣of'].map((label, id) => ({ id, text: label, label }))
  assert.equal(at(0, prompt), '\u2068مدينة\u2069 (0)')
  assert.equal(at(1, prompt), '\u2068שלום\u2069 (1)')
  assert.equal(at(2, prompt), '␣of (2)')
})

test('the direction of a prompt is that of most of its letters', () => {
  const tokens = (texts: readonly string[]) => texts.map((text, id) => tokenOf({ id, text }))
  assert.equal(directionOf(tokens(['<bos>', 'عاصمة', ' فرنسا'])), 'rtl')
  assert.equal(directionOf(tokens(['The word ', 'עיר', ' means city'])), 'ltr')
  assert.equal(directionOf(tokens(['12', '?'])), 'ltr')
})

const byteToken = (bytes: readonly number[], id: number) =>
  tokenOf({ id, text: '\ufffd', raw: btoa(String.fromCharCode(...bytes)) })

test('the bytes of one character are one piece of a prompt', () => {
  const [space, sad] = [0x20, [0xd8, 0xb5]] as const
  const tokens = [[space, sad[0]], [sad[1]], [0xf0, 0x9f], [0x90], [0xb1], [0xd8]].map(byteToken)
  assert.deepEqual(
    piecesOf(tokens).map(({ first, last, label }) => [first, last, label]),
    [
      [0, 1, '␣ص'],
      [2, 4, '🐱'],
      [5, 5, '<0xD8>'], // not a whole character
    ],
  )
  assert.equal(directionOf(tokens), 'rtl')
})

test('a byte that other tokens do not complete stays a byte', () => {
  const tokens = [byteToken([0xd8], 0), tokenOf({ id: 1, text: 'a' }), byteToken([0xb5], 2)]
  assert.deepEqual(
    piecesOf(tokens).map(({ label }) => label),
    ['<0xD8>', 'a', '<0xB5>'],
  )
})

test('a fitted label keeps its direction', () => {
  assert.equal(fitted('سنة2024', 20), '\u2068سنة2024\u2069')
  assert.equal(fitted('Tokyo', 4), 'Tok…')
})
