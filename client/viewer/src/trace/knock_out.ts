import { isLive, reportToParent } from '../browser/streams'
import type { InterveneResponse, OutcomeMessage } from '../contract'
import { number } from '../contract'
import type { FlowGraph, GraphNode } from '../model/flow_graph'
import { interventionOf } from '../model/knock_out'
import { TokenTable } from '../model/tokens'
import { button, element, tokenText } from '../presentation/elements'
import { count, decimals, probability, signed } from '../presentation/wording'
import { partOf } from './inspector'

// Knock-outs: a part of the pass is set to zero, and the prediction is measured again.

/** A measurement: its responses, or why there is none (yet). */
export interface KnockOut {
  id: string
  note?: string
  responses?: InterveneResponse[]
}

/** The measurements by node id. */
export class KnockOuts {
  private readonly byId = new Map<string, KnockOut>()
  /** The node whose section had the focus, which the next one takes over. */
  private focused: string | undefined

  constructor(private readonly changed: () => void) {}

  add(measured: KnockOut): void {
    if (document.activeElement?.closest('.knock-out')) this.focused = measured.id
    this.byId.set(measured.id, measured)
    this.changed()
  }

  /** The measurement of a node, or the button that asks for it. */
  section(node: GraphNode, graph: FlowGraph): HTMLElement | undefined {
    const target = graph.targets.get(node.position)?.target
    if (!target || !interventionOf(node.id)) return undefined
    const known = this.byId.get(node.id)
    if (!known && !isLive()) return undefined
    const section = element('section', { class: 'knock-out', tabindex: '-1' })
    if (this.focused === node.id) {
      this.focused = undefined
      queueMicrotask(() => section.focus()) // when it is in the page
    }
    if (known?.responses) {
      section.append(...effects(known.responses, node, graph), ...regenerate(node))
      return section
    }
    const what = 'Set this part to zero, and measure the prediction again'
    const ask = button('Knock out', what, () => {
      this.add({ id: node.id, note: 'measuring …' })
      reportToParent({
        knockOut: { id: node.id, position: node.position, targetId: target.id },
      })
    })
    section.append(
      ask,
      ' ',
      ...regenerate(node),
      ' ',
      element('span', { class: 'quiet', role: 'status' }, known?.note ?? ''),
    )
    return section
  }
}

/** The button that generates without the part; a source of attention cannot be hidden everywhere. */
function regenerate(node: GraphNode): HTMLElement[] {
  if (!isLive() || node.kind === 'MEMORY_VALUE') return []
  const what = 'Let the model continue with and without this part'
  return [button('Generate without it', what, () => reportToParent({ regenerate: node.id }))]
}

/** What the part adds to the target's logit, by its direct contribution and as measured. */
function effects(
  responses: readonly InterveneResponse[],
  node: GraphNode,
  graph: FlowGraph,
): HTMLElement[] {
  const tokens = new TokenTable()
  for (const response of responses) {
    tokens.learn(response.header?.promptTokens)
    tokens.learn(response.tokens)
  }
  const before = responses.find(({ header }) => header)?.header?.before?.[0] ?? {}
  const experiments = responses
    .flatMap(({ effect }) => effect ?? [])
    .sort((a, b) => (a.experiment ?? 0) - (b.experiment ?? 0))
  const part = partOf(node, graph)
  const estimates: [string, number | undefined][] = [
    ['direct contribution', part?.logitContribution],
    ['attribution', part?.attribution],
  ]
  const measured = experiments.map(({ label = '', after = [] }) => ({
    label,
    after: after[0] ?? {},
  }))
  const rows: [string, number][] = [
    ...estimates.flatMap(([name, value]) =>
      value === undefined ? [] : [[name, value] as [string, number]],
    ),
    ...measured.map(({ label, after }): [string, number] => [
      `measured ${label}`,
      number(before.targetLogit) - number(after.targetLogit),
    ]),
  ]
  const target = graph.targets.get(node.position)?.target.label ?? 'the target'
  const columns = measured.map(({ after }) => figures(before, after, tokens))
  const names = ['probability', 'log-probability', 'rank', 'KL', 'predicts'] as const
  const head = ['without it', ...measured.map(({ label }) => label)]
  return [
    element('h3', {}, 'Adds to the logit of ', tokenText(target)),
    bars(rows),
    element(
      'table',
      { class: 'scored effects' },
      element('thead', {}, row(head, 'col')),
      element(
        'tbody',
        {},
        ...names.map((name, i) => row([name, ...columns.map((column) => column[i] ?? '')], 'row')),
      ),
    ),
  ]
}

function row(cells: readonly (string | Node)[], scope: 'row' | 'col'): HTMLElement {
  const [first = '', ...others] = cells
  const cell = (content: string | Node) =>
    scope === 'col' ? element('th', { scope }, content) : element('td', {}, content)
  return element('tr', {}, element('th', { scope }, first), ...others.map(cell))
}

/** The target before and after, the divergence, and the prediction after. */
function figures(
  before: OutcomeMessage,
  after: OutcomeMessage,
  tokens: TokenTable,
): (string | Node)[] {
  const [was, is] = [number(before.targetProbability), number(after.targetProbability)]
  const top = after.topTokenIds?.[0]
  return [
    `${probability(was)} → ${probability(is)}`,
    signed(Math.log(is) - Math.log(was)),
    `${count(before.targetRank ?? 0)} → ${count(after.targetRank ?? 0)}`,
    `${decimals(number(after.klNats), 3)} nats`,
    top === undefined ? '' : tokenText(tokens.get(top).label),
  ]
}

function bars(rows: readonly [string, number][]): HTMLElement {
  const largest = Math.max(1e-9, ...rows.map(([, value]) => Math.abs(value) || 0))
  return element(
    'table',
    { class: 'scored effects' },
    element(
      'tbody',
      {},
      ...rows.map(([name, value]) => {
        const bar = element('span', { class: value < 0 ? 'bar subtracts' : 'bar' })
        bar.style.setProperty('--share', String(Math.abs(value) / largest || 0))
        return element(
          'tr',
          {},
          element('th', { scope: 'row' }, name),
          element('td', { class: 'bar-cell' }, bar),
          element('td', {}, signed(value)),
        )
      }),
    ),
  )
}
