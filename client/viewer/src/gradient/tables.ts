import type { EffectMessage, PreviewEditResponse } from '../contract'
import { number, type Reading } from '../model/flow_graph'
import {
  type GradientModel,
  matrixLayer,
  type NeuronChange,
  type Singular,
} from '../model/gradient'
import { TokenTable } from '../model/tokens'
import { element, tokenText } from '../presentation/elements'
import { measure, percent, probability } from '../presentation/wording'

// What a gradient shows on request: neurons, spectrum, verification, previews of edits.

const SHOWN = 3

type Cell = Node | string

/** A section with a table; nothing where there are no rows. */
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
  const row = kind === 'FF2' ? 'rows' : 'columns'
  return section(
    `Neurons of ${kind} that a step moves most`,
    `The top tokens of its ${row} before the step, of the change by itself, and after the step.`,
    ['layer', 'neuron', '|change|', 'before', 'the change', 'after'],
    rows,
  )
}

/** An expert that the loss does not reach has a gradient of zeros, whose neurons stay. */
function moved({ norm }: NeuronChange): boolean {
  return norm > 0
}

/** Below this part of the whole a direction is what rounding left. */
const ROUNDING = 1e-12

function counts({ explained }: Singular): boolean {
  return explained > ROUNDING
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
    'Explained: of the squared Frobenius norm. A direction’s sign is arbitrary, so both ends count.',
    ['layer', 'singular value', 'explained', 'one end', 'the other end'],
    rows,
  )
}

/** How far the sums of outer products are from autograd's dense gradients, in one line. */
export function verificationLine(model: GradientModel): HTMLElement[] {
  const checks = model.matrices.flatMap(({ verification }) => verification ?? [])
  if (checks.length === 0) return []
  const error = Math.max(...checks.map((check) => check.error))
  const tolerance = Math.min(...checks.map((check) => check.tolerance))
  const text =
    `${checks.length} matrices compared with autograd’s dense gradient: the largest relative ` +
    `error is ${measure(error)}, allowed is ${tolerance.toExponential(0)}.`
  return [element('p', { class: 'quiet verification' }, text)]
}

/** What an edit would do, before and after; `title` says which edit. */
export function previewTable(title: string, message: PreviewEditResponse): HTMLElement[] {
  const table = new TokenTable()
  table.learn(message.tokens)
  const row = (effect: EffectMessage): Cell[] => [
    effect.label ? element('bdi', {}, effect.label) : 'the edited prompt',
    tokenText(table.get(effect.targetTokenId ?? 0).label),
    share(number(effect.probabilityBefore), probability),
    share(number(effect.probabilityAfter), probability),
    `${effect.rankBefore ?? 0} → ${effect.rankAfter ?? 0}`,
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
    'The target’s probability and rank, and the model’s prediction, before and after; the model itself stays as it is.',
    ['prompt', 'target', 'before', 'after', 'rank', 'prediction', 'KL, bits'],
    effects.map(row),
  )
}

function tokens(reading: Reading | undefined, end: 'top' | 'bottom' = 'top'): Node {
  const shown = (reading?.[end] ?? []).slice(0, SHOWN)
  return element('span', { class: 'tops' }, ...shown.map(({ token }) => tokenText(token.label)))
}

/** A part of one as a number and a bar. */
function share(value: number, text: (value: number) => string = percent): Node {
  const bar = element('span', { class: 'bar' })
  bar.style.setProperty('--share', String(Math.min(1, value)))
  return element('span', { class: 'measured' }, text(value), bar)
}
