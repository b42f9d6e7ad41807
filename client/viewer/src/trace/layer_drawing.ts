import { select } from 'd3-selection'
import { finite } from '../contract'
import type { FlowGraph } from '../model/flow_graph'
import type { SelectionFlow } from '../model/graph_queries'
import { fitted } from '../model/tokens'
import { chipClass, type Marks, shownToken } from '../presentation/colours'
import { charactersIn, defineHatches, groupNamed, type Svg, setClasses } from '../presentation/svg'
import { nodeSentence } from '../presentation/wording'
import {
  type Bar,
  type Box,
  band,
  type Chip,
  type Detail,
  type Rail,
  type Ribbon,
  type Text,
  type Toggle,
} from './layer_pieces'

/** Draws everything that does not depend on the selection; `markDetail` does the rest. */
export function drawDetail(svg: Svg, detail: Detail, graph: FlowGraph): void {
  defineHatches(svg)
  svg.attr('width', detail.width).attr('height', detail.height)
  svg.attr('viewBox', `0 0 ${detail.width} ${detail.height}`)
  boxes(svg, 'panels', detail.panels, 12)
  boxes(svg, 'groups', detail.groups, 8)
  drawRail(svg, detail.rail)
  drawRibbons(svg, detail)
  boxes(svg, 'sums', detail.sums, 3)
  drawBars(svg, detail.bars)
  drawTexts(svg, detail.texts)
  drawToggles(svg, detail.toggles)
  drawChips(svg, detail, graph)
}

function boxes(svg: Svg, name: string, data: readonly Box[], radius: number): void {
  groupNamed(svg, name)
    .selectAll('rect')
    .data(data)
    .join('rect')
    .attr('x', (b) => b.x)
    .attr('y', (b) => b.y)
    .attr('width', (b) => b.width)
    .attr('height', (b) => b.height)
    .attr('rx', radius)
}

function drawRail(svg: Svg, rail: Rail): void {
  const group = groupNamed(svg, 'rail')
  const middle = railMiddle(rail)
  group
    .selectAll('rect')
    .data(rail.segments)
    .join('rect')
    .attr('x', (s) => s.x0)
    .attr('width', (s) => Math.max(0, s.x1 - s.x0))
    .attr('y', (s) => middle - thickness(s.share) / 2)
    .attr('height', (s) => thickness(s.share))
  group
    .selectAll('path')
    .data(rail.joints)
    .join('path')
    .attr('d', jointPath)
    .attr('class', (j) => ((j.share ?? 0) < 0 ? 'joint subtracts' : 'joint'))
    .attr('stroke-width', (j) => thickness(j.share))
  groupNamed(svg, 'rail-flow') // the selection's share
  groupNamed(svg, 'rail-text')
    .selectAll('text')
    .data([
      ...rail.segments.map((s) => ({
        x: (s.x0 + s.x1) / 2,
        y: rail.y - 7,
        label: s.x1 - s.x0 > 175 ? s.label : '',
        anchor: 'middle',
      })),
      ...rail.joints.map((j) => ({ x: j.to - 12, y: j.y1 + 12, label: j.label, anchor: 'end' })),
    ])
    .join('text')
    .attr('x', (t) => t.x)
    .attr('y', (t) => t.y)
    .attr('dominant-baseline', 'central')
    .attr('text-anchor', (t) => t.anchor)
    .text((t) => t.label)
}

export function railMiddle(rail: Rail): number {
  return rail.y + 11.5
}

/** Straight up, or horizontally below the rail to the joint. */
export function jointPath(joint: Rail['joints'][number]): string {
  const { x, to, y0, y1 } = joint
  return Math.abs(to - x) < 1 ? `M${x},${y0}V${y1}` : `M${x},${y0}V${y1 + 24}H${to}V${y1}`
}

/** Thickness in pixels of the rail and its joints. */
export function thickness(share: number | undefined): number {
  return 2 + 16 * Math.min(1, Math.abs(finite(share)))
}

function drawRibbons(svg: Svg, detail: Detail): void {
  groupNamed(svg, 'ribbons')
    .selectAll<SVGPathElement, Ribbon>('path')
    .data(detail.ribbons)
    .join('path')
    .attr('data-id', (r) => r.node.id)
    .attr('d', (r) => band(r))
  groupNamed(svg, 'flow') // the selection's share, above the ribbons
  groupNamed(svg, 'ends')
    .selectAll('rect')
    .data(detail.ribbons.filter((r) => r.h1 > 0 && isIntoSum(r, detail)))
    .join('rect')
    .attr('class', (r) => `end ${kindOf(r)}`)
    .attr('x', (r) => r.x1)
    .attr('y', (r) => r.y1)
    .attr('width', 12)
    .attr('height', (r) => Math.max(0.3, r.h1 - (r.h1 > 2 ? 0.6 : 0)))
}

export function kindOf(ribbon: Ribbon): string {
  if (ribbon.node.kind === 'OTHER') return 'rest'
  return ribbon.share < 0 ? 'subtracts' : 'adds'
}

function isIntoSum(ribbon: Ribbon, detail: Detail): boolean {
  return detail.sums.some((sum) => sum.x === ribbon.x1)
}

function drawBars(svg: Svg, bars: readonly Bar[]): void {
  groupNamed(svg, 'bars')
    .selectAll('rect')
    .data(bars)
    .join('rect')
    .attr('class', (b) => `bar ${b.kind}`)
    .attr('x', (b) => b.x)
    .attr('y', (b) => b.y)
    .attr('width', (b) => b.width)
    .attr('height', (b) => b.height)
}

function drawTexts(svg: Svg, texts: readonly Text[]): void {
  groupNamed(svg, 'texts')
    .selectAll('text')
    .data(texts)
    .join('text')
    .attr('class', (t) => t.style)
    .attr('x', (t) => t.x)
    .attr('y', (t) => t.y)
    .attr('text-anchor', (t) => t.anchor)
    .attr('dominant-baseline', 'central')
    .text((t) => (t.width === undefined ? t.text : fitted(t.text, roomFor(t))))
}

/** Number of characters that fit; sentences have a narrower font than tokens. */
function roomFor(text: Text): number {
  const width = text.width ?? 0
  return text.style === 'quiet' ? Math.floor(width / 6.1) : charactersIn(width * 1.08)
}

function drawToggles(svg: Svg, toggles: readonly Toggle[]): void {
  groupNamed(svg, 'toggles')
    .selectAll<SVGGElement, Toggle>('g')
    .data(toggles, (toggle) => toggle.head)
    .join((enter) => {
      const group = enter.append('g').attr('role', 'button').attr('tabindex', -1)
      group.append('rect').attr('rx', 5)
      group.append('text').attr('dominant-baseline', 'central').attr('x', 5)
      return group
    })
    .attr('class', 'toggle')
    .attr('data-head', (t) => t.head)
    .attr('aria-expanded', (t) => String(t.open))
    .attr('aria-label', (t) => `head ${t.head.split('.')[1]}: ${t.text.slice(2)}`)
    .attr('transform', (t) => `translate(${t.x},${t.y})`)
    .each(function (t) {
      const own = select(this)
      own.select('rect').attr('width', t.width).attr('height', t.height)
      own
        .select('text')
        .attr('y', t.height / 2)
        .text(t.text)
    })
}

function drawChips(svg: Svg, detail: Detail, graph: FlowGraph): void {
  groupNamed(svg, 'chips')
    .attr('role', 'list')
    .selectAll<SVGGElement, Chip>('g')
    .data(detail.chips, (c) => c.node.id)
    .join((enter) => {
      const group = enter.append('g')
      group.append('rect')
      group.append('text').attr('dominant-baseline', 'central')
      return group
    })
    .attr('data-id', (c) => c.node.id)
    .attr('role', 'listitem')
    .attr('tabindex', -1)
    .attr('aria-label', (c) => nodeSentence(c.node, graph))
    .attr('transform', (c) => `translate(${c.x},${c.y})`)
    .each(function (c) {
      const own = select(this)
      own.select('rect').attr('width', c.width).attr('height', c.height).attr('rx', 5)
      own
        .select('text')
        .attr('x', 7)
        .attr('y', c.height / 2 + 0.5)
        .text(chipText(c))
    })
}

function chipText(chip: Chip): string {
  const room = charactersIn(chip.width - 11)
  // A count of hidden rows is shown without its unit rather than truncated.
  if (chip.text) return chip.text.length <= room ? chip.text : chip.text.replace(/ more$/, '')
  const label = shownToken(chip.node, chip.flipped)?.token.label ?? '—'
  return chip.flipped ? `▾${fitted(label, room - 1)}` : fitted(label, room)
}

// A selection, a search or a path changes classes and the coloured part of the ribbons.

export function markDetail(
  svg: Svg,
  detail: Detail,
  graph: FlowGraph,
  marks: Marks,
  flow: SelectionFlow,
): void {
  setClasses<Chip>(svg, '.chips > g', (chip) => {
    const classes = chipClass(chip.node, graph, marks, chip.flipped)
    return chip.text ? `${classes} rest` : classes
  })
  setClasses<Ribbon>(svg, '.ribbons > path', (ribbon) => ribbonClass(ribbon, marks))
  const followed = detail.ribbons.filter(({ node }) => flow.has(node.id))
  groupNamed(svg, 'flow')
    .selectAll('path')
    .data(followed)
    .join('path')
    .attr('class', 'followed')
    .attr('d', (ribbon) => band(ribbon, 0, flow.get(ribbon.node.id)))
  markRail(svg, detail.rail, flow)
}

/** Colours the selection's share of the residual and of its joints. */
function markRail(svg: Svg, rail: Rail, flow: SelectionFlow): void {
  const middle = railMiddle(rail)
  const wide = (part: { node: { id: string }; share: number | undefined }) =>
    thickness(part.share) * (flow.get(part.node.id) ?? 0)
  const pieces = [
    ...rail.segments.map((s) => ({
      id: s.node.id,
      d: `M${s.x0},${middle}H${s.x1}`,
      wide: wide(s),
    })),
    ...rail.joints.map((j) => ({ id: j.node.id, d: jointPath(j), wide: wide(j) })),
  ]
  groupNamed(svg, 'rail-flow')
    .selectAll('path')
    .data(pieces.filter((piece) => piece.wide > 0))
    .join('path')
    .attr('data-flow', (piece) => piece.id)
    .attr('d', (piece) => piece.d)
    .attr('stroke-width', (piece) => piece.wide)
}

function ribbonClass(ribbon: Ribbon, marks: Marks): string {
  const classes = ['ribbon', kindOf(ribbon)]
  const { id } = ribbon.node
  if ((marks.path && !marks.path.has(id)) || (marks.found && !marks.found.has(id))) {
    classes.push('dim')
  }
  return classes.join(' ')
}
