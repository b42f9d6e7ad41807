import type { TokenMessage } from '../contract'

// Tokens and their labels for SVG, canvas, HTML and screen readers. The Python client applies the
// same rules in `token_text.py`; test/labels.json checks both.

const VISIBLE: Record<string, string> = { ' ': '␣', '\n': '⏎', '\r': '␍', '\t': '⇥' }
// Controls, formats (zero-width, bidi), surrogates, private use, unassigned, other separators.
const UNPRINTABLE = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zs}\p{Zl}\p{Zp}]/u
const COMBINING = /^\p{M}/u
const REPLACEMENT = '\ufffd'
const NO_BYTES = new Uint8Array()
// Letters, digits and marks of ASCII, which are shown as they are.
const PLAIN = /^[!-~]+$/

/** Replaces characters that a page would hide or interpret with visible ones; "" stays empty. */
export function visible(text: string, raw: Uint8Array = NO_BYTES): string {
  if (PLAIN.test(text)) return text
  if (text.includes(REPLACEMENT) && raw.length > 0 && textOf(raw) === undefined) return bytes(raw)
  const shown = Array.from(text, visibleCharacter).join('')
  return COMBINING.test(shown) ? `◌${shown}` : shown
}

function visibleCharacter(character: string): string {
  const known = VISIBLE[character]
  if (known !== undefined) return known
  if (!UNPRINTABLE.test(character)) return character
  const point = character.codePointAt(0) ?? 0
  return `<U+${point.toString(16).toUpperCase().padStart(4, '0')}>`
}

function bytes(raw: Uint8Array): string {
  return Array.from(raw, (b) => `<0x${b.toString(16).toUpperCase().padStart(2, '0')}>`).join('')
}

/** The text of bytes; undefined if they are not valid UTF-8. */
function textOf(raw: Uint8Array): string | undefined {
  try {
    return new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(raw)
  } catch {
    return undefined
  }
}

const graphemes = new Intl.Segmenter(undefined, { granularity: 'grapheme' })

/** Truncates a label to `length` graphemes, the last of which is an ellipsis. */
export function cut(label: string, length: number): string {
  if (label.length <= length) return label
  const pieces = Array.from(graphemes.segment(label), (piece) => piece.segment)
  return pieces.length <= length ? label : `${pieces.slice(0, length - 1).join('')}…`
}

const RIGHT_TO_LEFT = /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufeff]/

/** The label for use within other text: isolated if it is right-to-left, so that it does not reorder it. */
export function isolated(label: string): string {
  return RIGHT_TO_LEFT.test(label) ? `\u2068${label}\u2069` : label
}

/** A label truncated to `length` graphemes, isolated so that its own direction orders it. */
export function fitted(label: string, length: number): string {
  return isolated(cut(label, length))
}

/** Adjacent tokens that are text only together, such as the bytes of one character, or one token. */
export interface Piece {
  /** Index of its first token. */
  first: number
  last: number
  text: string
  label: string
}

const LONGEST = 8 // tokens; a character has at most four bytes

/** The text of tokens, in which bytes of one character that are several tokens are one piece. */
export function piecesOf(tokens: readonly Token[]): Piece[] {
  const pieces: Piece[] = []
  for (let first = 0; first < tokens.length; first++) {
    const { text, label } = tokens[first] as Token
    const piece = joined(tokens, first) ?? { first, last: first, text, label }
    pieces.push(piece)
    first = piece.last
  }
  return pieces
}

function joined(tokens: readonly Token[], first: number): Piece | undefined {
  const raw: number[] = []
  for (const [i, { part }] of tokens.slice(first, first + LONGEST).entries()) {
    if (!part) return undefined
    raw.push(...part)
    const text = textOf(Uint8Array.from(raw))
    if (text !== undefined) return { first, last: first + i, text, label: visible(text) }
  }
  return undefined
}

const LETTER = /\p{L}/gu

/** The direction of most letters of a text. */
export function directionOf(tokens: readonly Token[]): 'ltr' | 'rtl' {
  const letters = piecesOf(tokens).flatMap(({ text }) => text.match(LETTER) ?? [])
  const rightToLeft = letters.filter((letter) => RIGHT_TO_LEFT.test(letter)).length
  return 2 * rightToLeft > letters.length ? 'rtl' : 'ltr'
}

/** A vocabulary entry and its label. */
export interface Token {
  id: number
  /** The text in the stream. */
  text: string
  /** The text after `visible`; "#id" for a token without text. */
  label: string
  /** The bytes of a token that is not text by itself. */
  part?: Uint8Array
}

/** Tokens by id. A stream sends each token's text once, in the first message that uses it. */
export class TokenTable {
  private readonly byId = new Map<number, Token>()

  learn(messages: readonly TokenMessage[] = []): void {
    for (const message of messages) {
      const token = tokenOf(message)
      if (!this.byId.has(token.id)) this.byId.set(token.id, token)
    }
  }

  get(id: number): Token {
    return this.byId.get(id) ?? { id, text: '', label: `#${id}` }
  }

  all(): Iterable<Token> {
    return this.byId.values()
  }
}

export function tokenOf(message: TokenMessage): Token {
  const id = message.id ?? 0
  const text = message.text ?? ''
  // Only a replacement character can stand for bytes that are not text: decode no others.
  const raw = text.includes(REPLACEMENT) ? fromBase64(message.raw ?? '') : NO_BYTES
  const token = { id, text, label: visible(text, raw) || `#${id}` }
  const isPart = raw.length > 0 && textOf(raw) === undefined
  return isPart ? { ...token, part: raw } : token
}

export function fromBase64(text: string): Uint8Array<ArrayBuffer> {
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0))
}

/** Matches a token by id (`#719`), by its whole text (`␣Tokyo`) or by a part of its text. */
export function matcher(query: string): ((token: Token) => boolean) | undefined {
  const id = query.match(/^#(\d+)$/)
  if (id) return (token) => token.id === Number(id[1])
  const text = query.trim().toLowerCase()
  if (text === '') return undefined
  const exactly = query.startsWith(' ') || query.startsWith('␣')
  if (exactly) {
    const label = `␣${text.replace(/^␣/, '')}`
    return (token) => token.label.toLowerCase() === label
  }
  return (token) => token.label.toLowerCase().includes(text)
}
