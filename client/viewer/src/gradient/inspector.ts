import { finite } from '../contract'
import type { Scored } from '../model/flow_graph'
import {
  type Component,
  type GradientModel,
  matrixName,
  type Place,
  placeId,
  promotionRank,
  type Shifted,
  shiftOf,
} from '../model/gradient'
import { isolated } from '../model/tokens'
import { element, scoredList, targetButton, tokenText } from '../presentation/elements'
import { count, measure, signed } from '../presentation/wording'
import { rankName, where } from './maps'

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
  const { reading } = component
  const facts = element('section', { class: 'facts', 'data-place': where(component, model) })
  const target = model.targets[0]?.id
  const shift = shiftOf(component)
  const shifts = shift ? [...shift.promoted, ...shift.suppressed] : []
  const largest = Math.max(1e-9, ...shifts.map(({ change }) => Math.abs(finite(change))))
  const lists = shift
    ? [
        shiftList('↑ Promoted by a descent step', shift.promoted, target, largest),
        shiftList('↓ Suppressed by a descent step', shift.suppressed, target, largest),
      ]
    : [
        scoredList('Top tokens of x, the input', reading?.top ?? [], target),
        scoredList('Bottom tokens of x, the input', reading?.bottom ?? [], target),
      ]
  facts.append(
    element('h2', {}, tokenText(shownToken(component)?.token.label ?? '—')),
    whereLine(component, model),
    measures(component, model),
    ...lists,
    otherSide(component),
  )
  return facts
}

/** A table of tokens with the change of their logits, the largest of which has a full bar. */
function shiftList(
  title: string,
  shifted: readonly Shifted[],
  target: number | undefined,
  largest: number,
): HTMLElement {
  if (shifted.length === 0) return element('span')
  const rows = shifted.map(({ token, change }) => {
    const bar = element('span', { class: change < 0 ? 'bar subtracts' : 'bar' })
    bar.style.setProperty('--share', String(Math.abs(finite(change)) / largest))
    const isTarget = token.id === target
    return element(
      'tr',
      isTarget ? { class: 'target' } : {},
      element('th', { scope: 'row' }, isTarget ? tokenText(token.label) : targetButton(token)),
      element('td', { class: 'bar-cell' }, bar),
      element('td', { title: SHIFT }, signed(change, 1)),
    )
  })
  const caption = element('caption', { title: SHIFT }, title)
  return element('table', { class: 'scored shifts' }, caption, element('tbody', {}, ...rows))
}

const SHIFT = 'logit of δ, with the sign of a descent step'

/** The component's matrix and position. */
function whereLine({ matrix, position }: Component, model: GradientModel): HTMLElement {
  const token = model.prompt[position]
  const text = token ? [tokenText(token.label), ` (${position})`] : [`(${position})`]
  return element('p', { class: 'where' }, `${matrixName(matrix)}, at `, ...text)
}

/** The token shown for a component: the most promoted one, or an input's top token. */
export function shownToken(component: Component): Scored | undefined {
  return shiftOf(component)?.promoted[0] ?? component.reading?.top[0]
}

function measures(component: Component, model: GradientModel): HTMLElement {
  const of = model.vocabulary ? ` of ${count(model.vocabulary)}` : ''
  const rows: [string, string][] = [
    ['|x|, the input', measure(component.inputNorm)],
    ['|δ|, the VJP', measure(component.vjpNorm)],
    ['size |x||δ|', measure(component.size)],
  ]
  const { promoted } = component.matrix
  const rank = (name: string, value: number) => {
    const shown = count(promotionRank(value, promoted, model.vocabulary))
    rows.push([`${rankName(promoted)} of ${name}`, `${shown}${of}`])
  }
  component.targetRanks.forEach((value, i) => {
    rank(isolated(model.targets[i]?.label ?? 'the target'), value)
  })
  if (component.predictedRank !== undefined) {
    rank(
      `${isolated(model.predicted?.label ?? 'the prediction')}, predicted`,
      component.predictedRank,
    )
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
  const shift = shiftOf(component)
  const lines = shift
    ? [line('↑', shift.promoted), line('↓', shift.suppressed)]
    : [line('', component.reading?.top ?? [])]
  const { promoted } = component.matrix
  const ranks = component.targetRanks.map((rank) =>
    count(promotionRank(rank, promoted, model.vocabulary)),
  )
  return [
    whereLine(component, model),
    ...lines,
    element(
      'p',
      { class: 'numbers' },
      `|δ| ${measure(component.vjpNorm)}`,
      ` · |x| ${measure(component.inputNorm)}`,
      ` · ${rankName(promoted)} ${ranks.join(', ')}`,
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
