import type { Scored } from '../model/flow_graph'
import {
  type Component,
  type GradientModel,
  matrixName,
  type Place,
  placeId,
} from '../model/gradient'
import { element, scoredList, tokenText } from '../presentation/elements'
import { count, measure, signed } from '../presentation/wording'
import { where } from './maps'

// The inspector: the facts about the selected component.

export function fillFacts(
  aside: HTMLElement,
  model: GradientModel,
  place: Place | undefined,
): void {
  const found = place ? model.all(place) : []
  if (!place || found.length === 0) {
    aside.replaceChildren(element('p', { class: 'quiet' }, 'Select a cell to see its component.'))
    return
  }
  aside.replaceChildren(...found.map((c) => componentFacts(c, model)), otherMatrices(model, place))
}

/** One component: the norms of its factors, and the reading of the projected one. */
function componentFacts(component: Component, model: GradientModel): HTMLElement {
  const { reading, matrix } = component
  const facts = element('section', { class: 'facts', 'data-place': where(component, model) })
  const target = model.targets[0]?.id
  const lists: [string, readonly Scored[]][] = [
    [listTitle('Top', matrix.promoted === 'TOP', matrix.promoted), reading?.top ?? []],
    [listTitle('Bottom', matrix.promoted === 'BOTTOM', matrix.promoted), reading?.bottom ?? []],
  ]
  facts.append(
    element('h2', {}, tokenText(shownToken(component)?.token.label ?? '—')),
    whereLine(component, model),
    measures(component, model),
    ...lists.map(([title, list]) => scoredList(title, list, target)),
    otherSide(component),
  )
  return facts
}

/** The component's matrix and position. */
function whereLine({ matrix, position }: Component, model: GradientModel): HTMLElement {
  const token = model.prompt[position]
  const text = token ? [tokenText(token.label), ` (${position})`] : [`(${position})`]
  return element('p', { class: 'where' }, `${matrixName(matrix)}, at `, ...text)
}

function listTitle(end: string, promoted: boolean, known: string): string {
  if (known === '') return `${end} tokens of x, the input`
  return `${end} tokens of δ, ${promoted ? 'promoted' : 'suppressed'} by a descent step`
}

/** The token shown for a component: the most promoted one, or an input's top token. */
export function shownToken(component: Component): Scored | undefined {
  const { reading, matrix } = component
  return matrix.promoted === 'BOTTOM' ? reading?.bottom[0] : reading?.top[0]
}

function measures(component: Component, model: GradientModel): HTMLElement {
  const of = model.vocabulary ? ` of ${count(model.vocabulary)}` : ''
  const rows: [string, string][] = [
    ['|x|, the input', measure(component.inputNorm)],
    ['|δ|, the VJP', measure(component.vjpNorm)],
    ['size |x||δ|', measure(component.size)],
  ]
  component.targetRanks.forEach((rank, i) => {
    rows.push([`rank of ${model.targets[i]?.label ?? 'the target'}`, `${count(rank)}${of}`])
  })
  if (component.predictedRank !== undefined) {
    const predicted = model.predicted?.label ?? 'the prediction'
    rows.push([`rank of ${predicted}, predicted`, `${count(component.predictedRank)}${of}`])
  }
  if (component.reading) rows.push(['entropy', `${measure(component.reading.entropyBits)} bits`])
  const { matrix } = component
  rows.push([`norm of the gradient [${matrix.dIn}, ${matrix.dOut}]`, measure(matrix.norm)])
  rows.push(['components shown', `${matrix.components.length} of ${matrix.count}`])
  const shown = rows.map(([name, value]) =>
    element('div', {}, element('dt', {}, name), element('dd', {}, value)),
  )
  return element('dl', { class: 'measures' }, ...shown)
}

function otherSide(component: Component): HTMLElement {
  if (component.otherSide.length === 0) return element('div')
  const factor = component.matrix.side === 'INPUT' ? 'δ' : 'x'
  const unit = component.matrix.kind.match(/^[QKVO]$/) ? 'coordinate' : 'neuron'
  const rows = component.otherSide.map(({ index, value }) =>
    element(
      'tr',
      {},
      element('th', { scope: 'row' }, `${unit} ${index}`),
      element('td', {}, signed(value, 3)),
    ),
  )
  return element(
    'table',
    { class: 'scored' },
    element('caption', {}, `Largest entries of ${factor}`),
    element('tbody', {}, ...rows),
  )
}

/** The tooltip of a component. */
export function componentTooltip(component: Component, model: GradientModel): Node[] {
  const line = (mark: string, list: readonly Scored[]) =>
    element(
      'p',
      { class: 'tops' },
      mark,
      ...list.slice(0, 4).map(({ token }) => tokenText(token.label)),
    )
  const { reading } = component
  return [
    whereLine(component, model),
    line('▲', reading?.top ?? []),
    line('▼', reading?.bottom ?? []),
    element(
      'p',
      { class: 'numbers' },
      `|δ| ${measure(component.vjpNorm)}`,
      ` · |x| ${measure(component.inputNorm)}`,
      ` · rank ${component.targetRanks.map(count).join(', ')}`,
    ),
  ]
}

/** Links to the other matrices at the same layer and position. */
function otherMatrices(model: GradientModel, place: Place): HTMLElement {
  const kinds = [...model.kinds('INPUT'), ...model.kinds('VJP')].filter((k) => k !== place.kind)
  const others = kinds.flatMap((kind) => model.at({ ...place, kind }) ?? [])
  const list = element('section', { class: 'node-links' })
  if (others.length > 0) list.append(element('h3', {}, 'Other matrices here'))
  for (const other of others) {
    const id = placeId({ ...place, kind: other.matrix.kind })
    list.append(
      element(
        'button',
        { type: 'button', class: 'node-link', 'data-id': id },
        tokenText(shownToken(other)?.token.label ?? '—'),
        element('span', { class: 'what' }, other.matrix.kind),
        element('span', { class: 'number' }, `|δ| ${measure(other.vjpNorm)}`),
      ),
    )
  }
  return list
}
