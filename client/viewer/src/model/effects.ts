import type { InterveneResponse, InterventionEffectMessage, OutcomeMessage } from '../contract'
import { number, type ProvenanceMessage } from '../contract'
import { type Token, TokenTable, tokenOf } from './tokens'

/** The effect of one experiment on the prediction at the last position that is read. */
export interface Effect {
  /** Row and column of the heat map: the layer, and the other coordinates or the label. */
  row: string
  column: string
  coordinates: InterventionEffectMessage
  after: OutcomeMessage
}

/** What an effect is measured by. */
export type Measure = 'logit' | 'log' | 'probability' | 'kl'

/** The effects of several experiments, from the messages received so far. */
export class Effects {
  readonly tokens = new TokenTable()
  readonly all: Effect[] = []
  prompt: Token[] = []
  before: OutcomeMessage = {}
  provenance: ProvenanceMessage = {}
  experiments = 0
  complete = false
  /** Incremented with every message. */
  version = 0

  feed({ header, effect, summary, tokens }: InterveneResponse): void {
    this.version++
    this.tokens.learn(tokens)
    if (header) {
      this.tokens.learn(header.promptTokens)
      this.prompt = (header.promptTokens ?? []).map(tokenOf)
      this.before = header.before?.at(-1) ?? {}
      this.provenance = header.provenance ?? {}
      this.experiments = header.experiments ?? 0
    }
    const after = effect?.after?.at(-1)
    if (effect && after) {
      const row = effect.layer === undefined ? '' : `L${effect.layer}`
      this.all.push({ row, column: columnOf(effect), coordinates: effect, after })
    }
    if (summary) this.complete = true
  }

  get target(): Token {
    return this.tokens.get(this.before.targetTokenId ?? 0)
  }

  /** The change by an experiment; a divergence is not negative. */
  value({ after }: Effect, measure: Measure): number {
    const { before } = this
    if (measure === 'kl') return number(after.klNats)
    if (measure === 'logit') return number(after.targetLogit) - number(before.targetLogit)
    const [was, is] = [number(before.targetProbability), number(after.targetProbability)]
    return measure === 'log' ? Math.log(is) - Math.log(was) : is - was
  }

  /** The effects, largest change first. */
  strongest(measure: Measure): Effect[] {
    const size = (effect: Effect) => Math.abs(this.value(effect, measure)) || 0
    return [...this.all].sort((a, b) => size(b) - size(a))
  }

  /** The distinct rows, from top to bottom: the last layer first. */
  rows(): string[] {
    return distinct(
      this.all,
      ({ coordinates }) => coordinates.layer ?? 0,
      (e) => e.row,
    ).reverse()
  }

  columns(): string[] {
    return distinct(this.all, orderOf, (effect) => effect.column)
  }

  /** The heading of a column. */
  label(column: string): string {
    const { coordinates } = this.all.find((effect) => effect.column === column) ?? {}
    const position = coordinates?.position ?? coordinates?.sourcePosition
    const alone = coordinates?.head === undefined && coordinates?.neuron === undefined
    return (alone && position !== undefined && this.prompt[position]?.label) || column
  }

  /** `L3, head 2` or `L3, ␣Japan (3)`. */
  name({ row, column, coordinates }: Effect): string {
    const { position } = coordinates
    const place =
      position === undefined ? column : `${this.prompt[position]?.label ?? ''} (${position})`
    return [row, place].filter(Boolean).join(', ')
  }
}

function columnOf({
  label,
  position,
  head,
  neuron,
  sourcePosition,
  experiment,
  layer,
}: InterventionEffectMessage): string {
  const named = [
    position === undefined ? '' : `position ${position}`,
    head === undefined ? '' : `head ${head}`,
    neuron === undefined ? '' : `neuron ${neuron}`,
    sourcePosition === undefined ? '' : `source ${sourcePosition}`,
  ].filter(Boolean)
  if (named.length > 0) return named.join(', ')
  return label || (layer === undefined ? `experiment ${experiment ?? 0}` : 'layer')
}

function orderOf({ coordinates }: Effect): number {
  const { position, head, neuron, sourcePosition, experiment, layer } = coordinates
  const parts = [position, head, neuron, sourcePosition]
  if (parts.every((part) => part === undefined)) return layer === undefined ? (experiment ?? 0) : 0
  return parts.reduce((order: number, part) => order * 4096 + (part ?? 0), 0)
}

function distinct(
  effects: readonly Effect[],
  order: (effect: Effect) => number,
  name: (effect: Effect) => string,
): string[] {
  const places = new Map(effects.map((effect) => [name(effect), order(effect)]))
  return [...places].sort(([, a], [, b]) => a - b).map(([text]) => text)
}
