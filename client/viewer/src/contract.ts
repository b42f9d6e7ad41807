// The contract's messages as canonical protobuf JSON: what a stream's lines hold. An absent scalar
// without presence is its zero; `protos/januslens/v1/` says what each field means.

export interface TokenMessage {
  id?: number
  text?: string
  raw?: string
  start?: number
  end?: number
}

export interface ProjectionMessage {
  topTokenIds?: number[]
  topProbabilities?: Float[]
  topLogits?: Float[]
  bottomTokenIds?: number[]
  bottomProbabilities?: Float[]
  bottomLogits?: Float[]
  entropyBits?: Float
  targetRank?: number
  targetProbability?: Float
  targetLogit?: Float
}

/** A float; what JSON has no number for comes as a word. */
export type Float = number | 'NaN' | 'Infinity' | '-Infinity'

export interface ProvenanceMessage {
  model?: string
  revision?: string
  architecture?: string
  dataType?: string
  device?: string
  attention?: string
  versions?: Record<string, string>
}

export interface ModelSizesMessage {
  nLayers?: number
  nHeads?: number
  dMlp?: number
  vocabSize?: number
  dHead?: number
}

export interface StageTimeMessage {
  stage?: string
  seconds?: Float
}

export interface GuaranteeMessage {
  name?: string
  measuredError?: Float
  tolerance?: Float
  contents?: boolean
}

export interface NodeMessage {
  id: string
  kind: string
  layer?: number
  position?: number
  head?: number
  sourcePosition?: number
  neuron?: number
  expert?: number
  norm?: Float
  activation?: Float
  projection?: ProjectionMessage
}

export interface EdgeMessage {
  source: string
  target: string
  kind: string
  weight?: Float
  share?: Float
  attention?: Float
  logitContribution?: Float
  overlap?: Float
}

export interface PositionTargetMessage {
  position?: number
  targetTokenId?: number
  predictedTokenId?: number
  targetProbability?: Float
  targetRank?: number
  targetLogit?: Float
  constantLogitContribution?: Float
}

export interface TraceHeaderMessage {
  requestId?: string
  provenance?: ProvenanceMessage
  promptTokens?: TokenMessage[]
  layers?: number[]
  targets?: PositionTargetMessage[]
  tokens?: TokenMessage[]
  sizes?: ModelSizesMessage
}

export interface LayerGraphMessage {
  layer?: number
  nodes?: NodeMessage[]
  edges?: EdgeMessage[]
  tokens?: TokenMessage[]
  last?: boolean
}

export interface TraceSummaryMessage {
  nodes?: number
  edges?: number
  times?: StageTimeMessage[]
  checks?: GuaranteeMessage[]
  constantLogitContribution?: Float
}

export interface TraceResponse {
  sequence?: string
  header?: TraceHeaderMessage
  layer?: LayerGraphMessage
  summary?: TraceSummaryMessage
}

// The messages of GradientLens and PreviewEdit as canonical protobuf JSON; see `messages.ts`.

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
