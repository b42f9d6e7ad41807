// The messages of `protos/januslens/v1/` as canonical protobuf JSON, one message per line of a
// stream. An absent scalar without presence has its zero value.

export interface TokenMessage {
  id?: number
  text?: string
  raw?: string
  start?: number
  end?: number
  message?: number
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
  logNormalizer?: Float
}

/** A float; protobuf JSON writes non-finite values as strings. */
export type Float = number | 'NaN' | 'Infinity' | '-Infinity'

export interface ProvenanceMessage {
  model?: string
  revision?: string
  architecture?: string
  dataType?: string
  device?: string
  attention?: string
  versions?: Record<string, string>
  quantization?: string
  lora?: string
}

export interface ModelSizesMessage {
  nLayers?: number
  nHeads?: number
  dMlp?: number
  vocabSize?: number
  dHead?: number
}

export interface WaitingMessage {
  requestsAhead?: number
  expectedSeconds?: Float
  waitedSeconds?: Float
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
  attribution?: Float
  overlap?: Float
}

export interface PositionTargetMessage {
  position?: number
  targetTokenId?: number
  predictedTokenId?: number
  targetProbability?: Float
  targetLogProbability?: Float
  targetRank?: number
  targetLogit?: Float
  logitDifference?: Float
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
  selectedBy?: string
  otherTokenId?: number
  limitedLayers?: LayerLevelMessage[]
}

/** How much of a layer is shown, and why it is not everything. */
export interface LayerLevelMessage {
  layer?: number
  level?: string
  reason?: string
  sublayers?: { module?: string; kind?: string }[]
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

// GradientLens and PreviewEdit.

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
  module?: string
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
  module?: string
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
    limitedLayers?: LayerLevelMessage[]
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

// Generate and Intervene.

export interface StreamHeaderMessage {
  requestId?: string
  provenance?: ProvenanceMessage
  promptTokens?: TokenMessage[]
  before?: OutcomeMessage[]
  experiments?: number
}

export interface StreamSummaryMessage {
  times?: StageTimeMessage[]
  finishReason?: string
}

export interface LayerOutcomeMessage {
  layer?: number
  rank?: number
  probability?: Float
  topTokenIds?: number[]
}

export interface GeneratedTokenMessage {
  token?: TokenMessage
  logProbability?: Float
  entropyBits?: Float
  topTokenIds?: number[]
  topProbabilities?: Float[]
  layers?: LayerOutcomeMessage[]
}

export interface GenerateResponse {
  sequence?: string
  header?: StreamHeaderMessage
  generated?: GeneratedTokenMessage
  summary?: StreamSummaryMessage
  tokens?: TokenMessage[]
}

export interface OutcomeMessage {
  position?: number
  targetTokenId?: number
  targetProbability?: Float
  targetLogit?: Float
  targetRank?: number
  logitDifference?: Float
  klNats?: Float
  topTokenIds?: number[]
  topProbabilities?: Float[]
}

export interface InterventionEffectMessage {
  experiment?: number
  label?: string
  layer?: number
  position?: number
  head?: number
  neuron?: number
  sourcePosition?: number
  after?: OutcomeMessage[]
}

export interface InterveneResponse {
  sequence?: string
  header?: StreamHeaderMessage
  effect?: InterventionEffectMessage
  summary?: StreamSummaryMessage
  tokens?: TokenMessage[]
}

/** Decodes a float; an absent one is 0. All non-finite values become NaN. */
export function number(value: Float | undefined): number {
  const decoded = value === undefined ? 0 : Number(value)
  return Number.isFinite(decoded) ? decoded : Number.NaN
}

/** Decodes a float with presence. */
export function optional(value: Float | undefined): number | undefined {
  return value === undefined ? undefined : number(value)
}

/** A number for geometry and comparisons: 0 if it is missing or not finite. */
export function finite(value: number | undefined): number {
  return value !== undefined && Number.isFinite(value) ? value : 0
}
