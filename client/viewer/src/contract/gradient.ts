// The messages of GradientLens and PreviewEdit as canonical protobuf JSON; see `messages.ts`.
import type {
  Float,
  ModelSizesMessage,
  ProjectionMessage,
  ProvenanceMessage,
  StageTimeMessage,
  TokenMessage,
} from './messages'

export interface EntryMessage {
  index?: number
  value?: Float
}

export interface ComponentMessage {
  position?: number
  inputNorm?: Float
  vjpNorm?: Float
  size?: Float
  projection?: ProjectionMessage
  predictedRank?: number
  targetRanks?: number[]
  otherSide?: EntryMessage[]
}

export interface SingularMessage {
  value?: Float
  explained?: Float
  projection?: ProjectionMessage
}

export interface NeuronChangeMessage {
  neuron?: number
  changeNorm?: Float
  before?: ProjectionMessage
  change?: ProjectionMessage
  after?: ProjectionMessage
}

export interface GradientMatrixMessage {
  layer?: number
  kind?: string
  expert?: number
  dIn?: number
  dOut?: number
  projectedSide?: string
  promotedEnd?: string
  components?: ComponentMessage[]
  componentCount?: number
  frobeniusNorm?: Float
  spectrum?: SingularMessage[]
  neurons?: NeuronChangeMessage[]
  verification?: { relativeError?: Float; tolerance?: Float }
  tokens?: TokenMessage[]
  last?: boolean
}

export interface SegmentRowMessage {
  segment?: string
  layer?: number
  kind?: string
  meanVjpNorm?: Float
  meanTargetRank?: Float
  positions?: number
}

export interface GradientResponse {
  sequence?: string
  header?: {
    provenance?: ProvenanceMessage
    sizes?: ModelSizesMessage
    promptTokens?: TokenMessage[]
    loss?: Float
    targetTokenIds?: number[]
    predictedTokenId?: number
    skipped?: string[]
    tokens?: TokenMessage[]
  }
  matrix?: GradientMatrixMessage
  summary?: { matrices?: number; times?: StageTimeMessage[]; segments?: SegmentRowMessage[] }
}

export interface EffectMessage {
  label?: string
  targetTokenId?: number
  probabilityBefore?: Float
  probabilityAfter?: Float
  rankBefore?: number
  rankAfter?: number
  predictedBefore?: number
  predictedAfter?: number
  klBits?: Float
}

export interface PreviewEditResponse {
  edited?: EffectMessage
  probes?: EffectMessage[]
  tokens?: TokenMessage[]
}
