// One matrix's gradient as records: components, singular directions, neurons.
import type {
  ComponentMessage,
  GradientMatrixMessage,
  NeuronChangeMessage,
  SingularMessage,
} from '../contract/gradient'
import type { ProjectionMessage } from '../contract/messages'
import { number, type Reading } from '../graph/nodes'

/** One position's outer product. */
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
  /** Which factor is read: the input, which is imprinted, or the VJP, by which the output shifts. */
  side: 'INPUT' | 'VJP'
  /** Where the tokens stand that a descent step promotes; '' for inputs. */
  promoted: 'TOP' | 'BOTTOM' | ''
  components: Component[]
  /** How many the whole gradient has. */
  count: number
  norm: number
  spectrum: Singular[]
  neurons: NeuronChange[]
  verification: { error: number; tolerance: number } | undefined
}

/** `L3`, or `L3 expert 2`. */
export function owner({ layer, expert }: Matrix): string {
  return expert === undefined ? `L${layer}` : `L${layer} expert ${expert}`
}

/** `L3 FF2`, or `L3 expert 2 FF2`. */
export function matrixName(matrix: Matrix): string {
  return `${owner(matrix)} ${matrix.kind}`
}

export type Read = (projection?: ProjectionMessage) => Reading | undefined

/** A matrix without its lists, which may come in several messages. */
export function matrixOf(message: GradientMatrixMessage, kind: string): Matrix {
  const end = (message.promotedEnd ?? '').replace('END_', '')
  return {
    layer: message.layer ?? 0,
    kind,
    expert: message.expert,
    dIn: message.dIn ?? 0,
    dOut: message.dOut ?? 0,
    side: message.projectedSide === 'SIDE_VJP' ? 'VJP' : 'INPUT',
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
