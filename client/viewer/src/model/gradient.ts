import type {
  ComponentMessage,
  GradientMatrixMessage,
  GradientResponse,
  LayerLevelMessage,
  NeuronChangeMessage,
  ProjectionMessage,
  ProvenanceMessage,
  SegmentRowMessage,
  SingularMessage,
} from '../contract'
import { finite, number } from '../contract'
import { type Reading, readingOf, type Scored } from './flow_graph'
import { type Token, TokenTable, tokenOf } from './tokens'

// The gradient of a loss, built from the messages received so far.

/** The outer product of one position. */
export interface Component {
  matrix: Matrix
  position: number
  inputNorm: number
  vjpNorm: number
  size: number
  reading: Reading | undefined
  predictedRank: number | undefined
  targetRanks: number[]
  otherSide: { index: number; value: number }[]
}

export interface Singular {
  value: number
  explained: number
  reading: Reading | undefined
}

export interface NeuronChange {
  neuron: number
  norm: number
  before: Reading | undefined
  change: Reading | undefined
  after: Reading | undefined
}

export interface Matrix {
  layer: number
  kind: string
  expert: number | undefined
  dIn: number
  dOut: number
  /** The factor that is projected: the input x or the VJP δ; '' for neither. */
  side: 'INPUT' | 'VJP' | ''
  /** The end of the ranking that a descent step promotes; '' for inputs. */
  promoted: 'TOP' | 'BOTTOM' | ''
  components: Component[]
  /** Number of components of the whole gradient. */
  count: number
  norm: number
  spectrum: Singular[]
  neurons: NeuronChange[]
  verification: { error: number; tolerance: number } | undefined
}

/** `L3`, or `L3 expert 2`. */
export function matrixLayer({ layer, expert }: Matrix): string {
  return expert === undefined ? `L${layer}` : `L${layer} expert ${expert}`
}

/** `L3 FF2`, or `L3 expert 2 FF2`. */
export function matrixName(matrix: Matrix): string {
  return `${matrixLayer(matrix)} ${matrix.kind}`
}

/** A token and the change of its logit: that of δ, with the sign of a descent step. */
export interface Shifted extends Scored {
  change: number
}

/** The tokens that a descent step promotes and suppresses, the most first; undefined for inputs. */
export function shiftOf({
  matrix,
  reading,
}: Component): { promoted: readonly Shifted[]; suppressed: readonly Shifted[] } | undefined {
  if (matrix.promoted === '' || !reading) return undefined
  const sign = matrix.promoted === 'TOP' ? 1 : -1
  const shifted = (scored: Scored) => ({ ...scored, change: sign * scored.logit })
  const [top, bottom] = [reading.top.map(shifted), reading.bottom.map(shifted)]
  return sign > 0 ? { promoted: top, suppressed: bottom } : { promoted: bottom, suppressed: top }
}

/**
 * A rank from the promoted end: 0 is the token that a descent step promotes most. Ranks in inputs,
 * and those in a vocabulary of unknown size, stay as they are.
 */
export function promotionRank(
  rank: number,
  promoted: Matrix['promoted'] | undefined,
  vocabulary: number | undefined,
): number {
  return promoted === 'BOTTOM' && vocabulary ? vocabulary - 1 - rank : rank
}

export type Read = (projection?: ProjectionMessage) => Reading | undefined

/** A matrix with empty lists; several messages may fill them. */
const SIDES: Record<string, Matrix['side']> = {
  GRADIENT_FACTOR_INPUT: 'INPUT',
  GRADIENT_FACTOR_VJP: 'VJP',
}

export function matrixOf(message: GradientMatrixMessage, kind: string): Matrix {
  const end = (message.promotedEnd ?? '').replace('RANKING_END_', '')
  return {
    layer: message.layer ?? 0,
    kind,
    expert: message.expert,
    dIn: message.dIn ?? 0,
    dOut: message.dOut ?? 0,
    side: SIDES[message.projectedSide ?? ''] ?? '',
    promoted: end === 'TOP' || end === 'BOTTOM' ? end : '',
    components: [],
    count: message.componentCount ?? 0,
    norm: number(message.frobeniusNorm),
    spectrum: [],
    neurons: [],
    verification: undefined,
  }
}

export function componentOf(message: ComponentMessage, matrix: Matrix, read: Read): Component {
  return {
    matrix,
    position: message.position ?? 0,
    inputNorm: number(message.inputNorm),
    vjpNorm: number(message.vjpNorm),
    size: number(message.size),
    reading: read(message.projection),
    predictedRank: message.predictedRank,
    targetRanks: message.targetRanks ?? [],
    otherSide: (message.otherSide ?? []).map(({ index, value }) => ({
      index: index ?? 0,
      value: number(value),
    })),
  }
}

export function singularOf(message: SingularMessage, read: Read): Singular {
  return {
    value: number(message.value),
    explained: number(message.explained),
    reading: read(message.projection),
  }
}

export function neuronOf(message: NeuronChangeMessage, read: Read): NeuronChange {
  return {
    neuron: message.neuron ?? 0,
    norm: number(message.changeNorm),
    before: read(message.before),
    change: read(message.change),
    after: read(message.after),
  }
}

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
  private targetIds: readonly number[] = []
  private predictedId: number | undefined
  loss = 0
  provenance: ProvenanceMessage = {}
  vocabulary: number | undefined
  layerCount: number | undefined
  skipped: string[] = []
  /** The layers without all parts. */
  limited: LayerLevelMessage[] = []
  segments: Segment[] = []
  complete = false
  /** Incremented with every message, so that a view knows when to redraw. */
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

  /** The tokens of the targets; a later message than the header can contain their texts. */
  get targets(): Token[] {
    return this.targetIds.map((id) => this.tokens.get(id))
  }

  get predicted(): Token | undefined {
    return this.predictedId === undefined ? undefined : this.tokens.get(this.predictedId)
  }

  /** The kinds of one side received so far, in the order of the forward pass; then modules. */
  kinds(side: Matrix['side']): string[] {
    const known = new Set(this.matrices.filter((m) => m.side === side).map((m) => m.kind))
    const modules = [...known].filter((kind) => !KINDS.includes(kind))
    return [...KINDS.filter((kind) => known.has(kind)), ...modules]
  }

  of(kind: string): Matrix[] {
    return this.matrices.filter((matrix) => matrix.kind === kind)
  }

  /** The experts that the router selected, ascending. */
  experts(): number[] {
    const known = new Set(this.matrices.flatMap(({ expert }) => expert ?? []))
    return [...known].sort((a, b) => a - b)
  }

  /** The component at a place: the given expert's, or the largest of all experts. */
  at(place: Place, expert?: number): Component | undefined {
    const found = this.all(place)
    if (expert === undefined) return found[0]
    return found.find(({ matrix }) => matrix.expert === undefined || matrix.expert === expert)
  }

  /** All components at a place, largest first; a mixture of experts can have several. */
  all(place: Place): readonly Component[] {
    return this.places.get(placeId(place)) ?? []
  }

  /** The layers to draw, ascending; all layers of the model until the stream is complete. */
  layers(): number[] {
    const known = new Set(this.matrices.map((matrix) => matrix.layer))
    if (!this.complete) for (let i = 0; i < (this.layerCount ?? 0); i++) known.add(i)
    return [...known].sort((a, b) => a - b)
  }

  private begin(header: NonNullable<GradientResponse['header']>): void {
    this.tokens.learn(header.promptTokens)
    this.tokens.learn(header.tokens)
    this.prompt = (header.promptTokens ?? []).map(tokenOf)
    this.targetIds = header.targetTokenIds ?? []
    this.predictedId = header.predictedTokenId ?? 0
    this.loss = number(header.loss)
    this.provenance = header.provenance ?? {}
    this.vocabulary = header.sizes?.vocabSize
    this.layerCount = header.sizes?.nLayers
    this.skipped = (header.skipped ?? []).map(kindOf)
    this.limited = header.limitedLayers ?? []
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
      [...others, component].sort((a, b) => finite(b.size) - finite(a.size)),
    )
  }

  /** The matrix that a message starts or continues. */
  private known(message: GradientMatrixMessage): Matrix {
    const kind = message.module || kindOf(message.kind ?? '')
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
    segment: (message.segment ?? '').replace('PROMPT_SEGMENT_', '').toLowerCase(),
    layer: message.layer ?? 0,
    kind: message.module || kindOf(message.kind ?? ''),
    norm: number(message.meanVjpNorm),
    rank: meanTargetRank === undefined ? undefined : number(meanTargetRank),
    positions: message.positions ?? 0,
  }
}

/** Coordinates of a component; layer and position are those of the flow graph. */
export interface Place {
  layer: number
  position: number
  kind: string
}

export function placeId({ layer, position, kind }: Place): string {
  return `L${layer}/p${position}/${kind}`
}

export function placeOf(id: string): Place | undefined {
  const match = id.match(/^L(\d+)\/p(\d+)\/(\w+)$/)
  if (!match) return undefined
  return { layer: Number(match[1]), position: Number(match[2]), kind: match[3] ?? '' }
}
