import type { EffectMessage, PreviewEditResponse } from '../contract'
import { finite, number } from '../contract'
import type { Reading } from '../model/flow_graph'
import {
  type GradientModel,
  matrixLayer,
  type NeuronChange,
  type Singular,
} from '../model/gradient'
import { TokenTable } from '../model/tokens'
import { element, tokenText } from '../presentation/elements'
import { count, measure, percent, probability } from '../presentation/wording'

// Optional tables: neurons, spectrum, verification, previews of edits.

const SHOWN = 3

type Cell = Node | string

/** A section with a table; empty if there are no rows. */
function section(
  title: string,
  note: string,
  headings: readonly string[],
  rows: readonly (readonly Cell[])[],
): HTMLElement[] {
  if (rows.length === 0) return []
  const head = headings.map((heading) => element('th', { scope: 'col' }, heading))
  const body = rows.map((cells) =>
    element('tr', {}, ...cells.map((cell) => element('td', {}, cell))),
  )
  const table = element(
    'table',
    { class: 'readings' },
    element('thead', {}, element('tr', {}, ...head)),
    element('tbody', {}, ...body),
  )
  return [
    element(
      'section',
      { class: 'panel' },
      element('h2', {}, title),
      element('p', { class: 'quiet' }, note),
      element(
        'div',
        { class: 'scroller', tabindex: '0', role: 'region', 'aria-label': title },
        table,
      ),
    ),
  ]
}

export function neuronTable(model: GradientModel, kind: string): HTMLElement[] {
  const rows = model
    .of(kind)
    .flatMap((matrix) =>
      matrix.neurons
        .filter(moved)
        .map((neuron) => [
          matrixLayer(matrix),
          String(neuron.neuron),
          measure(neuron.norm),
          tokens(neuron.before),
          tokens(neuron.change),
          neuron.after ? tokens(neuron.after) : '—',
        ]),
    )
  const row = kind === 'FF2' ? 'row' : 'column'
  return section(
    `Neurons of ${kind} that a descent step changes most`,
    `Top tokens of each neuron’s ${row} before the step, of the change alone, and after the step.`,
    ['layer', 'neuron', '|change|', 'before', 'change', 'after'],
    rows,
  )
}

/** Whether a step changes the neuron; an expert that the loss does not reach has a zero gradient. */
function moved({ norm }: NeuronChange): boolean {
  return norm !== 0
}

/** Directions that explain less than this are rounding errors. */
const ROUNDING = 1e-12

function counts({ explained }: Singular): boolean {
  return !(explained <= ROUNDING)
}

export function spectrumTable(model: GradientModel, kind: string): HTMLElement[] {
  const rows = model
    .of(kind)
    .flatMap((matrix) =>
      matrix.spectrum
        .filter(counts)
        .map((singular) => [
          matrixLayer(matrix),
          measure(singular.value),
          share(singular.explained),
          tokens(singular.reading),
          tokens(singular.reading, 'bottom'),
        ]),
    )
  return section(
    `Spectrum of ${kind}’s gradient`,
    'Explained is the share of the squared Frobenius norm. The sign of a singular vector is arbitrary, so both ends are shown.',
    ['layer', 'singular value', 'explained', 'one end', 'the other end'],
    rows,
  )
}

/** The largest error of the sums of outer products against autograd's dense gradients. */
export function verificationLine(model: GradientModel): HTMLElement[] {
  const checks = model.matrices.flatMap(({ verification }) => verification ?? [])
  if (checks.length === 0) return []
  const error = Math.max(...checks.map((check) => check.error))
  const tolerance = Math.min(...checks.map((check) => check.tolerance))
  const text =
    `${checks.length} matrices compared with autograd’s dense gradients: largest relative error ` +
    `${measure(error)}, tolerance ${measure(tolerance)}.`
  return [element('p', { class: 'quiet verification' }, text)]
}

/** The effects of an edit: probabilities, ranks and predictions before and after it. */
export function previewTable(title: string, message: PreviewEditResponse): HTMLElement[] {
  const table = new TokenTable()
  table.learn(message.tokens)
  const row = (effect: EffectMessage): Cell[] => [
    effect.label ? element('bdi', {}, effect.label) : 'the edited prompt',
    tokenText(table.get(effect.targetTokenId ?? 0).label),
    share(number(effect.probabilityBefore), probability),
    share(number(effect.probabilityAfter), probability),
    `${count(effect.rankBefore ?? 0)} → ${count(effect.rankAfter ?? 0)}`,
    element(
      'span',
      {},
      tokenText(table.get(effect.predictedBefore ?? 0).label),
      ' → ',
      tokenText(table.get(effect.predictedAfter ?? 0).label),
    ),
    measure(number(effect.klBits)),
  ]
  const effects = [...(message.edited ? [message.edited] : []), ...(message.probes ?? [])]
  return section(
    title,
    'The target’s probability and rank and the model’s prediction before and after the edit. The model on the server does not change.',
    ['prompt', 'target', 'before', 'after', 'rank', 'prediction', 'KL, bits'],
    effects.map(row),
  )
}

function tokens(reading: Reading | undefined, end: 'top' | 'bottom' = 'top'): Node {
  const shown = (reading?.[end] ?? []).slice(0, SHOWN)
  return element('span', { class: 'tops' }, ...shown.map(({ token }) => tokenText(token.label)))
}

/** A fraction of 1 as a number and a bar. */
function share(value: number, format: (value: number) => string = percent): Node {
  const bar = element('span', { class: 'bar' })
  bar.style.setProperty('--share', String(Math.min(1, finite(value))))
  return element('span', { class: 'measured' }, format(value), bar)
}
