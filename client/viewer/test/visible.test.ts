import assert from 'node:assert/strict'
import { test } from 'node:test'
import { cut, directionOf, fitted, fromBase64, tokenOf, visible } from '../src/model/tokens'
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

test('a fitted label keeps its direction', () => {
  assert.equal(fitted('سنة2024', 20), '\u2068سنة2024\u2069')
  assert.equal(fitted('Tokyo', 4), 'Tok…')
})
