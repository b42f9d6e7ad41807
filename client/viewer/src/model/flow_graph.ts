import type {
  EdgeMessage,
  Float,
  LayerLevelMessage,
  ModelSizesMessage,
  NodeMessage,
  PositionTargetMessage,
  ProjectionMessage,
  ProvenanceMessage,
  StageTimeMessage,
  TraceResponse,
} from '../contract'
import { finite, number, optional } from '../contract'
import { type Annotation, annotationKey, annotationsOf } from './annotations'
import { type Token, TokenTable, tokenOf } from './tokens'

/** A token with its probability and logit in a projection. */
export interface Scored {
  token: Token
  probability: number
  logit: number
  /** NaN if the server did not send it. */
  logProbability: number
}

/** The projection of a vector onto the vocabulary. */
export interface Reading {
  top: readonly Scored[]
  bottom: readonly Scored[]
  entropyBits: number
  targetRank: number | undefined
  targetProbability: number | undefined
  targetLogit: number | undefined
  targetLogProbability: number | undefined
}

/** One vector of the forward pass; `docs/semantics.md` defines the kinds. */
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
  /** The reader's name and note for the head or neuron that the node belongs to. */
  annotation: Annotation | undefined
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
  attribution: number | undefined
  overlap: number | undefined
}

export interface PositionTarget {
  position: number
  target: Token
  predicted: Token
  probability: number
  logProbability: number
  rank: number
  logit: number
  constantLogitContribution: number
  /** The target's logit minus that of the second token, if there is one. */
  logitDifference: number | undefined
}

export function nodeOf(message: NodeMessage, tokens: TokenTable): GraphNode {
  const { projection } = message
  let reading: Reading | undefined // made on first use: most nodes are never shown
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
    annotation: undefined,
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
    attribution: optional(message.attribution),
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
    logProbability: optional(message.targetLogProbability) ?? Number.NaN,
    rank: message.targetRank ?? 0,
    logit: number(message.targetLogit),
    constantLogitContribution: number(message.constantLogitContribution),
    logitDifference: optional(message.logitDifference),
  }
}

export function readingOf(message: ProjectionMessage, tokens: TokenTable): Reading {
  const normalizer = optional(message.logNormalizer) ?? Number.NaN
  const logit = optional(message.targetLogit)
  return {
    top: scored(
      tokens,
      normalizer,
      message.topTokenIds,
      message.topProbabilities,
      message.topLogits,
    ),
    bottom: scored(
      tokens,
      normalizer,
      message.bottomTokenIds,
      message.bottomProbabilities,
      message.bottomLogits,
    ),
    entropyBits: number(message.entropyBits),
    targetRank: message.targetRank,
    targetProbability: optional(message.targetProbability),
    targetLogit: logit,
    targetLogProbability: logit === undefined ? undefined : logit - normalizer,
  }
}

function scored(
  tokens: TokenTable,
  normalizer: number,
  ids: readonly number[] = [],
  probabilities: readonly Float[] = [],
  logits: readonly Float[] = [],
): Scored[] {
  return ids.map((id, i) => ({
    token: tokens.get(id),
    probability: number(probabilities[i]),
    logit: number(logits[i]),
    logProbability: number(logits[i]) - normalizer,
  }))
}

/** A node and its edge into the node that it is a part of. */
export interface Part {
  node: GraphNode
  edge: GraphEdge
}

/**
 * The flow graph of a forward pass, built from the messages received so far.
 *
 * Several streams of the same prompt may feed it: node ids are coordinates, so a node that arrives
 * twice has the same id. The first header lists the positions that were traced in full.
 */
export class FlowGraph {
  readonly tokens = new TokenTable()
  readonly nodes = new Map<string, GraphNode>()
  readonly layers = new Set<number>()
  readonly targets = new Map<number, PositionTarget>()
  prompt: Token[] = []
  /** Positions of the first header, which are traced in full. */
  traced: number[] = []
  provenance: ProvenanceMessage = {}
  sizes: ModelSizesMessage = {}
  /** Whether the parts were selected by what they add to the target's logit. */
  selectedByContribution = false
  /** The second token of a logit difference, which contributions then add up to. */
  other: Token | undefined
  /** The layers without all parts. */
  limited: LayerLevelMessage[] = []
  times: StageTimeMessage[] = []
  /** The reader's names and notes by the key of the head or neuron. */
  annotations: ReadonlyMap<string, Annotation> = new Map()
  /** Incremented with every message, so that a view knows when to redraw. */
  version = 0
  /** Whether every stream that started has also sent its summary. */
  get complete(): boolean {
    return this.headers > 0 && this.headers === this.summaries
  }

  /** Changes with every message and annotation, for views that name heads or neurons. */
  get labels(): string {
    return `${this.version} ${this.annotationText}`
  }

  /** Size of the vocabulary, if the stream reports it. */
  get vocabulary(): number | undefined {
    return this.sizes.vocabSize
  }

  private annotationText = ''
  private headers = 0
  private summaries = 0
  private readonly into = new Map<string, GraphEdge[]>()
  private readonly from = new Map<string, GraphEdge[]>()
  private readonly parts = new Map<string, readonly Part[]>()

  feed(message: TraceResponse): void {
    this.version++
    this.parts.clear()
    if (message.header) this.begin(message.header)
    if (message.header) this.headers++
    if (message.layer) this.extend(message.layer)
    if (message.summary) {
      this.summaries++
      this.times = message.summary.times ?? []
    }
  }

  private begin(header: NonNullable<TraceResponse['header']>): void {
    this.tokens.learn(header.promptTokens)
    this.tokens.learn(header.tokens)
    const targets = (header.targets ?? []).map((target) => positionTargetOf(target, this.tokens))
    if (this.prompt.length === 0) {
      this.prompt = (header.promptTokens ?? []).map(tokenOf)
      this.provenance = header.provenance ?? {}
      this.sizes = header.sizes ?? {}
      this.selectedByContribution = header.selectedBy === 'SELECTION_CRITERION_CONTRIBUTION'
      if (header.otherTokenId !== undefined) this.other = this.tokens.get(header.otherTokenId)
      this.limited = header.limitedLayers ?? []
      this.traced = targets.map((target) => target.position)
    }
    // Reserve a row for every layer, so that rows do not move as layers arrive.
    for (const layer of header.layers ?? []) this.layers.add(layer)
    for (const target of targets) {
      if (!this.targets.has(target.position)) this.targets.set(target.position, target)
    }
  }

  private extend(layer: NonNullable<TraceResponse['layer']>): void {
    this.tokens.learn(layer.tokens)
    this.layers.add(layer.layer ?? 0)
    for (const message of layer.nodes ?? []) {
      const node = nodeOf(message, this.tokens)
      this.nodes.set(message.id, this.withAnnotation(node))
    }
    for (const message of layer.edges ?? []) this.join(edgeOf(message))
  }

  /** Gives the nodes the annotations of a text (see `annotationsOf`), and removes all others. */
  annotate(text: string): void {
    if (text === this.annotationText) return
    this.annotationText = text
    this.annotations = annotationsOf(text)
    for (const node of this.nodes.values()) this.withAnnotation(node)
  }

  private withAnnotation(node: GraphNode): GraphNode {
    if (this.annotations.size > 0 || node.annotation)
      node.annotation = this.annotations.get(annotationKey(node) ?? '')
    return node
  }

  private join(edge: GraphEdge): void {
    const known = listOf(this.into, edge.target)
    if (known.some((other) => other.source === edge.source && other.kind === edge.kind)) return
    known.push(edge)
    listOf(this.from, edge.source).push(edge)
  }

  node(id: string): GraphNode | undefined {
    return this.nodes.get(id)
  }

  /** The node of these coordinates, e.g. `at(3, 7, 'BLOCK_OUTPUT')`. */
  at(layer: number, position: number, kind: string): GraphNode | undefined {
    return this.nodes.get(`L${layer}/p${position}/${kind}`)
  }

  edgesInto(id: string): readonly GraphEdge[] {
    return this.into.get(id) ?? []
  }

  edgesFrom(id: string): readonly GraphEdge[] {
    return this.from.get(id) ?? []
  }

  /** The parts that add up to a node, largest |share| first; their shares sum to 1. */
  partsOf(id: string): readonly Part[] {
    let parts = this.parts.get(id)
    if (!parts) {
      parts = this.sortedParts(id)
      this.parts.set(id, parts)
    }
    return parts
  }

  private sortedParts(id: string): Part[] {
    const parts: Part[] = []
    for (const edge of this.edgesInto(id)) {
      const node = edge.kind === 'PART' ? this.nodes.get(edge.source) : undefined
      if (node) parts.push({ node, edge })
    }
    return parts.sort((a, b) => Math.abs(finite(b.edge.share)) - Math.abs(finite(a.edge.share)))
  }

  /** The layer that shows a node: the first for the embedding, the last for the prediction. */
  layerOf(node: GraphNode): number {
    return node.layer ?? (node.kind === 'BLOCK_INPUT' ? Math.min : Math.max)(...this.layers)
  }

  /** The head that a node belongs to; a row of W_O belongs to the head of its coordinate. */
  headOf(node: GraphNode): number | undefined {
    const { dHead } = this.sizes
    if (node.kind !== 'ATTENTION_NEURON' || node.neuron === undefined || !dHead) return node.head
    return Math.floor(node.neuron / dHead)
  }

  /** The source of a node's first edge of one kind. */
  sourceBy(id: string, kind: string): GraphNode | undefined {
    const edge = this.edgesInto(id).find((candidate) => candidate.kind === kind)
    return edge && this.nodes.get(edge.source)
  }
}

function listOf<Item>(lists: Map<string, Item[]>, key: string): Item[] {
  let list = lists.get(key)
  if (!list) {
    list = []
    lists.set(key, list)
  }
  return list
}
