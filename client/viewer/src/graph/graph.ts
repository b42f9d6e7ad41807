import type {
  ModelSizesMessage,
  ProvenanceMessage,
  StageTimeMessage,
  TraceResponse,
} from '../contract/messages'
import { type Token, TokenTable, tokenOf } from '../label/tokens'
import {
  edgeOf,
  type GraphEdge,
  type GraphNode,
  nodeOf,
  type PositionTarget,
  positionTargetOf,
} from './nodes'

/** A node and the edge by which it enters another. */
export interface Part {
  node: GraphNode
  edge: GraphEdge
}

/**
 * The flow graph of a forward pass, as far as its messages have come.
 *
 * Several streams of the same prompt may feed it: ids are coordinates, equal in every request, so
 * what comes twice is the same node. The first header says which positions were asked for in full.
 */
export class FlowGraph {
  readonly tokens = new TokenTable()
  readonly nodes = new Map<string, GraphNode>()
  readonly layers = new Set<number>()
  readonly targets = new Map<number, PositionTarget>()
  prompt: Token[] = []
  /** Positions of the first header: those traced in full. */
  traced: number[] = []
  provenance: ProvenanceMessage = {}
  sizes: ModelSizesMessage = {}
  times: StageTimeMessage[] = []
  /** Grows with every message: what was drawn from an older version is out of date. */
  version = 0
  /** Whether every stream that began has come to its summary; one without was cut. */
  get complete(): boolean {
    return this.headers > 0 && this.headers === this.summaries
  }

  /** Size of the vocabulary, where the stream says it. */
  get vocabulary(): number | undefined {
    return this.sizes.vocabSize
  }

  private headers = 0
  private summaries = 0
  private readonly into = new Map<string, GraphEdge[]>()
  private readonly from = new Map<string, GraphEdge[]>()

  feed(message: TraceResponse): void {
    this.version++
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
      this.traced = targets.map((target) => target.position)
    }
    // A place for every layer that will come: what has come stays where it is.
    for (const layer of header.layers ?? []) this.layers.add(layer)
    for (const target of targets) {
      if (!this.targets.has(target.position)) this.targets.set(target.position, target)
    }
  }

  private extend(layer: NonNullable<TraceResponse['layer']>): void {
    this.tokens.learn(layer.tokens)
    this.layers.add(layer.layer ?? 0)
    for (const message of layer.nodes ?? []) {
      this.nodes.set(message.id, nodeOf(message, this.tokens))
    }
    for (const message of layer.edges ?? []) this.join(edgeOf(message))
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

  /** The parts that add up to a node, largest |share| first; their shares add to 1. */
  partsOf(id: string): Part[] {
    const parts: Part[] = []
    for (const edge of this.edgesInto(id)) {
      const node = edge.kind === 'PART' ? this.nodes.get(edge.source) : undefined
      if (node) parts.push({ node, edge })
    }
    return parts.sort((a, b) => Math.abs(b.edge.share ?? 0) - Math.abs(a.edge.share ?? 0))
  }

  /** The head that a node is of; a row of W_O is its coordinate's. */
  headOf(node: GraphNode): number | undefined {
    const { dHead } = this.sizes
    if (node.kind !== 'ATTENTION_NEURON' || node.neuron === undefined || !dHead) return node.head
    return Math.floor(node.neuron / dHead)
  }

  /** What a node is read from by one kind of edge, if it is. */
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
