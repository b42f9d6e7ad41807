import type {
  EdgeMessage,
  Float,
  NodeMessage,
  PositionTargetMessage,
  ProjectionMessage,
} from '../contract/messages'
import type { Token, TokenTable } from '../label/tokens'

/** A token with what a projection says of it. */
export interface Scored {
  token: Token
  probability: number
  logit: number
}

/** A vector read in the vocabulary. */
export interface Reading {
  top: readonly Scored[]
  bottom: readonly Scored[]
  entropyBits: number
  targetRank: number | undefined
  targetProbability: number | undefined
  targetLogit: number | undefined
}

/** One vector of the forward pass; semantics.md says what each kind is. */
export interface GraphNode {
  id: string
  kind: string
  layer: number | undefined
  position: number
  head: number | undefined
  source: number | undefined
  neuron: number | undefined
  expert: number | undefined
  norm: number
  activation: number | undefined
  readonly reading: Reading | undefined
}

export interface GraphEdge {
  source: string
  target: string
  kind: string
  weight: number
  share: number | undefined
  attention: number | undefined
  logitContribution: number | undefined
  overlap: number | undefined
}

export interface PositionTarget {
  position: number
  target: Token
  predicted: Token
  probability: number
  rank: number
  logit: number
  constantLogitContribution: number
}

export function nodeOf(message: NodeMessage, tokens: TokenTable): GraphNode {
  const { projection } = message
  let reading: Reading | undefined // made when first asked for: most nodes are never looked at
  return {
    id: message.id,
    kind: message.kind.replace('NODE_KIND_', ''),
    layer: message.layer,
    position: message.position ?? 0,
    head: message.head,
    source: message.sourcePosition,
    neuron: message.neuron,
    expert: message.expert,
    norm: number(message.norm),
    activation: optional(message.activation),
    get reading() {
      if (projection && !reading) reading = readingOf(projection, tokens)
      return reading
    },
  }
}

export function edgeOf(message: EdgeMessage): GraphEdge {
  return {
    source: message.source,
    target: message.target,
    kind: message.kind.replace('EDGE_KIND_', ''),
    weight: number(message.weight),
    share: optional(message.share),
    attention: optional(message.attention),
    logitContribution: optional(message.logitContribution),
    overlap: optional(message.overlap),
  }
}

export function positionTargetOf(
  message: PositionTargetMessage,
  tokens: TokenTable,
): PositionTarget {
  return {
    position: message.position ?? 0,
    target: tokens.get(message.targetTokenId ?? 0),
    predicted: tokens.get(message.predictedTokenId ?? 0),
    probability: number(message.targetProbability),
    rank: message.targetRank ?? 0,
    logit: number(message.targetLogit),
    constantLogitContribution: number(message.constantLogitContribution),
  }
}

export function readingOf(message: ProjectionMessage, tokens: TokenTable): Reading {
  return {
    top: scored(tokens, message.topTokenIds, message.topProbabilities, message.topLogits),
    bottom: scored(
      tokens,
      message.bottomTokenIds,
      message.bottomProbabilities,
      message.bottomLogits,
    ),
    entropyBits: number(message.entropyBits),
    targetRank: message.targetRank,
    targetProbability: optional(message.targetProbability),
    targetLogit: optional(message.targetLogit),
  }
}

function scored(
  tokens: TokenTable,
  ids: readonly number[] = [],
  probabilities: readonly Float[] = [],
  logits: readonly Float[] = [],
): Scored[] {
  return ids.map((id, i) => ({
    token: tokens.get(id),
    probability: number(probabilities[i]),
    logit: number(logits[i]),
  }))
}

/** A float of the stream; an absent one is 0, and "NaN" or "Infinity" what they say. */
export function number(value: Float | undefined): number {
  return value === undefined ? 0 : Number(value)
}

function optional(value: Float | undefined): number | undefined {
  return value === undefined ? undefined : Number(value)
}
