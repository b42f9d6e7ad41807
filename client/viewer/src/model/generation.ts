import type { GenerateResponse, ProvenanceMessage } from '../contract'
import { number } from '../contract'
import { fromBase64, type Token, TokenTable, tokenOf } from './tokens'

/** What the output of a layer predicts at the position before a generated token. */
export interface LayerOutcome {
  layer: number
  /** Rank of the generated token; 0 = the layer predicts it. */
  rank: number
  probability: number
  top: Token[]
}

export interface GeneratedToken {
  token: Token
  /** The token's bytes, which may be a part of a character. */
  raw: Uint8Array
  logProbability: number
  entropyBits: number
  top: { token: Token; probability: number }[]
  /** Ascending by layer. */
  layers: LayerOutcome[]
}

/** The first layer read from which the token remains the prediction. */
export function decidedAt({ layers }: GeneratedToken): number | undefined {
  let found: number | undefined
  for (const { layer, rank } of [...layers].reverse()) {
    if (rank > 0) break
    found = layer
  }
  return found
}

/** A generated text, from the messages received so far. */
export class Generation {
  readonly tokens = new TokenTable()
  readonly generated: GeneratedToken[] = []
  prompt: Token[] = []
  /** Whether a token of the prompt is a part of a message, rather than of the chat template. */
  inMessage: boolean[] = []
  provenance: ProvenanceMessage = {}
  /** Why the generation ended; empty while it is incomplete. */
  finishReason = ''

  feed(response: GenerateResponse): void {
    this.tokens.learn(response.tokens)
    const { header, generated, summary } = response
    if (header) {
      const prompt = header.promptTokens ?? []
      this.tokens.learn(prompt)
      this.prompt = prompt.map(tokenOf)
      this.inMessage = prompt.map(({ message }) => message !== undefined)
      this.provenance = header.provenance ?? {}
    }
    if (generated) {
      const named = (ids: readonly number[] = []) => ids.map((id) => this.tokens.get(id))
      this.tokens.learn(generated.token ? [generated.token] : [])
      this.generated.push({
        token: tokenOf(generated.token ?? {}),
        raw: fromBase64(generated.token?.raw ?? ''),
        logProbability: number(generated.logProbability),
        entropyBits: number(generated.entropyBits),
        top: named(generated.topTokenIds).map((token, i) => ({
          token,
          probability: number(generated.topProbabilities?.[i]),
        })),
        layers: (generated.layers ?? []).map((read) => ({
          layer: read.layer ?? 0,
          rank: read.rank ?? 0,
          probability: number(read.probability),
          top: named(read.topTokenIds),
        })),
      })
    }
    if (summary) this.finishReason = summary.finishReason ?? ''
  }

  /** The generated text, without the end-of-sequence token. */
  text(): string {
    const ended = this.finishReason === 'end_of_sequence'
    return textOf(ended ? this.generated.slice(0, -1) : this.generated)
  }

  /** The ids of the prompt and of the generated tokens before number `k`. */
  idsBefore(k: number): number[] {
    return [...this.prompt, ...this.generated.slice(0, k).map(({ token }) => token)].map(
      ({ id }) => id,
    )
  }

  /** The text that `idsBefore` has the ids of. */
  textBefore(k: number): string {
    return this.prompt.map(({ text }) => text).join('') + textOf(this.generated.slice(0, k))
  }

  /** The number of the first token that differs from another generation; undefined if none does. */
  differsFrom(other: Generation): number | undefined {
    const k = this.generated.findIndex(({ token }, i) => token.id !== other.generated[i]?.token.id)
    return k < 0 ? undefined : k
  }
}

function textOf(tokens: readonly GeneratedToken[]): string {
  const decoder = new TextDecoder()
  return tokens.map(({ raw }) => decoder.decode(raw, { stream: true })).join('') + decoder.decode()
}
