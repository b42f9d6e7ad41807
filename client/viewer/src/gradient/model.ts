// The gradient of a loss as far as its messages have come.
import type {
  GradientMatrixMessage,
  GradientResponse,
  SegmentRowMessage,
} from '../contract/gradient'
import type { ProjectionMessage, ProvenanceMessage } from '../contract/messages'
import { number, type Reading, readingOf } from '../graph/nodes'
import { type Token, TokenTable, tokenOf } from '../label/tokens'
import { type Component, componentOf, type Matrix, matrixOf, neuronOf, singularOf } from './records'
import { type Place, placeId } from './state'

export interface Segment {
  segment: string
  layer: number
  kind: string
  norm: number
  rank: number | undefined
  positions: number
}

export class GradientModel {
  readonly tokens = new TokenTable()
  readonly matrices: Matrix[] = []
  prompt: Token[] = []
  targets: Token[] = []
  predicted: Token | undefined
  loss = 0
  provenance: ProvenanceMessage = {}
  vocabulary: number | undefined
  layerCount: number | undefined
  skipped: string[] = []
  segments: Segment[] = []
  complete = false
  /** Grows with every message: what was drawn from an older version is out of date. */
  version = 0
  private readonly places = new Map<string, Component[]>()

  feed(message: GradientResponse): void {
    this.version++
    if (message.header) this.begin(message.header)
    if (message.matrix) this.extend(message.matrix)
    if (message.summary) {
      this.segments = (message.summary.segments ?? []).map(segmentOf)
      this.complete = true
    }
  }

  /** The kinds of one side that have come, in the papers' order. */
  kinds(side: Matrix['side']): string[] {
    const known = new Set(this.matrices.filter((m) => m.side === side).map((m) => m.kind))
    return KINDS.filter((kind) => known.has(kind))
  }

  of(kind: string): Matrix[] {
    return this.matrices.filter((matrix) => matrix.kind === kind)
  }

  /** The experts that a mixture routed to, ascending. */
  experts(): number[] {
    const known = new Set(this.matrices.flatMap(({ expert }) => expert ?? []))
    return [...known].sort((a, b) => a - b)
  }

  /** What stands at a place; of several experts' components one's, or else the largest. */
  at(place: Place, expert?: number): Component | undefined {
    const found = this.all(place)
    if (expert === undefined) return found[0]
    return found.find(({ matrix }) => matrix.expert === undefined || matrix.expert === expert)
  }

  /** Every component at a place, largest first: several where a mixture routes to experts. */
  all(place: Place): readonly Component[] {
    return this.places.get(placeId(place)) ?? []
  }

  /** The blocks of the picture, ascending; before all have come, as many as the model has. */
  layers(): number[] {
    const known = new Set(this.matrices.map((matrix) => matrix.layer))
    if (!this.complete) for (let i = 0; i < (this.layerCount ?? 0); i++) known.add(i)
    return [...known].sort((a, b) => a - b)
  }

  private begin(header: NonNullable<GradientResponse['header']>): void {
    this.tokens.learn(header.promptTokens)
    this.tokens.learn(header.tokens)
    this.prompt = (header.promptTokens ?? []).map(tokenOf)
    this.targets = (header.targetTokenIds ?? []).map((id) => this.tokens.get(id))
    this.predicted = this.tokens.get(header.predictedTokenId ?? 0)
    this.loss = number(header.loss)
    this.provenance = header.provenance ?? {}
    this.vocabulary = header.sizes?.vocabSize
    this.layerCount = header.sizes?.nLayers
    this.skipped = (header.skipped ?? []).map(kindOf)
  }

  private extend(message: GradientMatrixMessage): void {
    this.tokens.learn(message.tokens)
    const read = (projection?: ProjectionMessage): Reading | undefined =>
      projection && readingOf(projection, this.tokens)
    const matrix = this.known(message)
    for (const part of message.components ?? []) {
      this.put(componentOf(part, matrix, read))
    }
    matrix.spectrum.push(...(message.spectrum ?? []).map((s) => singularOf(s, read)))
    matrix.neurons.push(...(message.neurons ?? []).map((n) => neuronOf(n, read)))
    const { verification } = message
    if (verification) {
      const { relativeError, tolerance } = verification
      matrix.verification = { error: number(relativeError), tolerance: number(tolerance) }
    }
  }

  private put(component: Component): void {
    const { matrix, position } = component
    matrix.components.push(component)
    const id = placeId({ layer: matrix.layer, position, kind: matrix.kind })
    const others = this.places.get(id) ?? []
    this.places.set(
      id,
      [...others, component].sort((a, b) => b.size - a.size),
    )
  }

  /** The matrix that a message begins or continues. */
  private known(message: GradientMatrixMessage): Matrix {
    const kind = kindOf(message.kind ?? '')
    const found = this.of(kind).find(
      (m) => m.layer === (message.layer ?? 0) && m.expert === message.expert,
    )
    if (found) return found
    const made = matrixOf(message, kind)
    this.matrices.push(made)
    return made
  }
}

const KINDS = ['FF1', 'GATE', 'UP', 'FF2', 'Q', 'K', 'V', 'O']

function kindOf(name: string): string {
  return name.replace('MATRIX_KIND_', '')
}

function segmentOf(message: SegmentRowMessage): Segment {
  const { meanTargetRank } = message
  return {
    segment: message.segment ?? '',
    layer: message.layer ?? 0,
    kind: kindOf(message.kind ?? ''),
    norm: number(message.meanVjpNorm),
    rank: meanTargetRank === undefined ? undefined : number(meanTargetRank),
    positions: message.positions ?? 0,
  }
}
