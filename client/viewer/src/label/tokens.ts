import type { TokenMessage } from '../contract/messages'
import { visible } from './visible'

/** One entry of the vocabulary as the pages show it. */
export interface Token {
  id: number
  /** The text as the stream gave it. */
  text: string
  /** What is shown: see `visible`; "#id" for a token without text. */
  label: string
}

/** The texts that a stream has named so far; each comes once, with the message that needs it. */
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
  const text = message.text ?? ''
  return {
    id: message.id ?? 0,
    text,
    label: visible(text, fromBase64(message.raw ?? '')) || `#${message.id ?? 0}`,
  }
}

export function fromBase64(text: string): Uint8Array<ArrayBuffer> {
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0))
}
