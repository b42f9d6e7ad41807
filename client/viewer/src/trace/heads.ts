import { create, select } from 'd3-selection'
import { ChangeTracker } from '../browser/shell'
import { finite } from '../contract'
import type { FlowGraph, GraphNode } from '../model/flow_graph'
import { fitted } from '../model/tokens'
import { type Marks, markClass } from '../presentation/colours'
import { element, type Tooltip } from '../presentation/elements'
import { explained } from '../presentation/sentences'
import {
  charactersIn,
  defineHatches,
  type Group,
  groupNamed,
  type Svg,
  setClasses,
} from '../presentation/svg'
import { nodeSentence, percent, signed } from '../presentation/wording'
import { preview } from './inspector'
import { drawPanel, LEGEND_HEIGHT, LEGEND_LINE, LEGEND_WIDTH, PANEL_PARTS } from './overview'
import { drawRowLabels } from './overview_grid'
import { headLayout, type Layout, panelWidth } from './overview_layout'

interface Actions {
  open: (id: string) => void
  pin: (id: string) => void
}

/** All heads at a position by layer. */
export class HeadMatrix {
  readonly element: HTMLElement
  private readonly svg = create('svg').attr('class', 'picture heads') as unknown as Svg
  private readonly layoutChanges = new ChangeTracker()
  private readonly markChanges = new ChangeTracker()

  constructor(
    private readonly graph: FlowGraph,
    private readonly tooltip: Tooltip,
    actions: Actions,
  ) {
    const picture = this.svg.node() as SVGSVGElement
    this.element = element('section', { class: 'overview-box' }, picture)
    this.svg
      .attr('role', 'grid')
      .attr('aria-label', 'Attention heads by layer, first layer at the bottom')
    picture.addEventListener('click', (event) => {
      const id = idOf(event)
      if (id) (event.ctrlKey || event.metaKey ? actions.pin : actions.open)(id)
    })
    picture.addEventListener('pointermove', (event) => this.hovered(event))
    picture.addEventListener('pointerleave', () => this.tooltip.hide())
  }

  /** Draws the matrix with the target panel; or in this height beside a picture that has the panel. */
  draw(
    width: number,
    position: number,
    marks: Marks,
    shown: readonly number[],
    height?: number,
  ): void {
    const placed = this.layoutChanges.changed(width, position, this.graph.labels, height ?? '')
    if (placed) this.place(width, position, height)
    if (this.markChanges.changed(marks.key, String(shown)) || placed)
      markHeads(this.svg, marks, shown)
  }

  /** The drawn width; a few heads do not need all of the room. */
  get width(): number {
    return this.svg.node()?.width.baseVal.value ?? 0
  }

  private place(room: number, position: number, tallest: number | undefined): void {
    const panel = tallest === undefined ? panelWidth(room) : 0
    const { graph, svg } = this
    const of = headsAt(graph, position)
    const layers = [...graph.layers].sort((a, b) => a - b)
    const at = headLayout(of.columns, layers, room, panel, tallest)
    const width = Math.min(room, Math.max(LEGEND_WIDTH, at.panelX + panel))
    const height = at.height + LEGEND_HEIGHT + LEGEND_LINE
    svg.attr('width', width).attr('height', height).attr('viewBox', `0 0 ${width} ${height}`)
    drawHeads(svg, graph, at, of)
    if (panel > 0) drawPanel(svg, graph, at, position)
    else for (const part of PANEL_PARTS) groupNamed(svg, part).selectAll('*').remove()
    drawHeadLegend(svg, at, of)
  }

  private hovered(event: PointerEvent): void {
    const node = this.graph.node(idOf(event) ?? '')
    if (node) this.tooltip.show(preview(node, this.graph), event.clientX, event.clientY)
    else this.tooltip.hide()
  }
}

function idOf(event: Event): string | undefined {
  return (event.target as Element).closest<SVGElement>('[data-id]')?.dataset.id
}

// The value of a head: its contribution to the target's logit or, without that, its share of the
// layer's heads.

export interface Head {
  layer: number
  head: number
  node: GraphNode
  value: number
}

export interface Heads {
  heads: Head[]
  /** Number of columns: the model's heads, or the largest known head. */
  columns: number
  /** Largest |value|. */
  largest: number
  /** Description of the values. */
  measure: string
  format: (value: number) => string
}

/** The heads that the graph has at a position; the request may have selected fewer than all. */
export function headsAt(graph: FlowGraph, position: number): Heads {
  const found: { node: GraphNode; logit: number | undefined; share: number }[] = []
  for (const layer of graph.layers) {
    for (const { node, edge } of graph.partsOf(`L${layer}/p${position}/ATTENTION_CONCAT`)) {
      if (node.kind !== 'HEAD_OUTPUT') continue
      found.push({ node, logit: edge.logitContribution, share: edge.share ?? 0 })
    }
  }
  const attributed = found.length > 0 && found.every(({ logit }) => logit !== undefined)
  const heads = found.map(({ node, logit, share }) => ({
    layer: node.layer ?? 0,
    head: node.head ?? 0,
    node,
    value: attributed ? (logit ?? 0) : share,
  }))
  const largest = Math.max(1e-9, ...heads.map(({ value }) => Math.abs(finite(value))))
  return {
    heads,
    columns: graph.sizes.nHeads ?? Math.max(0, ...heads.map(({ head }) => head + 1)),
    largest,
    measure: attributed
      ? `adds to the ${explained(graph, position)}`
      : 'share of its layer’s heads',
    format: attributed ? (value) => signed(value, largest < 0.1 ? 3 : 2) : percent,
  }
}

const STRONGEST = 0.55 // opacity at which text stays readable
const TWO_LINES = 32 // px; lower cells show only the token

export function drawHeads(svg: Svg, graph: FlowGraph, at: Layout, of: Heads): void {
  defineHatches(svg)
  drawAbsent(groupNamed(svg, 'absent'), at, of)
  drawCells(groupNamed(svg, 'cells'), graph, at, of)
  drawRowLabels(groupNamed(svg, 'rows'), at)
  drawAxis(groupNamed(svg, 'axis'), at)
}

/** Outlines of the heads that the stream does not contain. */
function drawAbsent(group: Group, at: Layout, { heads }: Heads): void {
  const known = new Set(heads.map(({ layer, head }) => `${layer}.${head}`))
  const outlines = at.rows.flatMap((row) =>
    at.columns
      .filter((column) => !known.has(`${row.layer}.${column.position}`))
      .map(({ x, width }) => `M${x},${row.y}h${width}v${at.cellHeight}h-${width}z`),
  )
  group
    .selectAll('path')
    .data([outlines.join('')])
    .join('path')
    .attr('d', String)
}

/** Cells grouped by row, as the ARIA grid pattern requires. */
function drawCells(group: Group, graph: FlowGraph, at: Layout, of: Heads): void {
  const rows = at.rows.map(({ layer }) => of.heads.filter((head) => head.layer === layer))
  group
    .selectAll<SVGGElement, Head[]>('g.row')
    .data(rows.filter((row) => row.length > 0))
    .join('g')
    .attr('class', 'row')
    .attr('role', 'row')
    .selectAll<SVGGElement, Head>('g')
    .data(
      (row) => row,
      (cell) => cell.node.id,
    )
    .join((enter) => {
      const cell = enter.append('g').attr('role', 'gridcell').attr('tabindex', -1)
      cell.append('rect').attr('rx', Math.min(6, at.cellHeight / 4))
      return cell
    })
    .attr('data-id', (cell) => cell.node.id)
    .each(function (cell) {
      const seen = placeCell(this, cell, at, of)
      this.setAttribute('aria-label', `${nodeSentence(cell.node, graph)}, ${of.measure}: ${seen}`)
    })
}

/** Draws a cell and returns its text. */
function placeCell(group: SVGGElement, cell: Head, at: Layout, of: Heads): string {
  const column = at.columns[cell.head]
  const row = at.rows.find(({ layer }) => layer === cell.layer)
  if (!column || !row) return ''
  const part = Math.abs(finite(cell.value)) / of.largest
  const own = select(group).attr('transform', `translate(${column.x},${row.y})`)
  own
    .select('rect')
    .attr('width', column.width)
    .attr('height', at.cellHeight)
    .attr('fill-opacity', STRONGEST * part)
  const named = cell.node.annotation?.name ?? ''
  const label = named || (cell.node.reading?.top[0]?.token.label ?? '')
  const token =
    column.labelled && at.cellHeight >= 11 ? fitted(label, charactersIn(column.width - 11)) : ''
  const two = at.cellHeight >= TWO_LINES && token !== ''
  const lines = [
    { text: token, style: named && 'strong', y: at.cellHeight * (two ? 0.3 : 0.47) },
    { text: two ? of.format(cell.value) : '', style: 'number', y: at.cellHeight * 0.66 },
  ]
  own
    .selectAll('text')
    .data(lines.filter(({ text }) => text !== ''))
    .join('text')
    .attr('class', (line) => line.style)
    .attr('x', 6)
    .attr('y', (line) => line.y)
    .attr('dominant-baseline', 'central')
    .text((line) => line.text)
  own
    .selectAll('path')
    .data([part])
    .join('path')
    .attr('d', `M0,${at.cellHeight - 3}h${part * column.width}v3h${-part * column.width}z`)
  own
    .selectAll('circle')
    .data(cell.node.annotation ? [0] : [])
    .join('circle')
    .attr('class', 'annotated')
    .attr('cx', column.width - 4)
    .attr('cy', 4)
    .attr('r', 2.2)
  return two ? `${token}${of.format(cell.value)}` : `${token} ${of.format(cell.value)}`
}

function drawAxis(group: Group, at: Layout): void {
  const every = Math.ceil(26 / ((at.columns[1]?.x ?? 99) - (at.columns[0]?.x ?? 0)))
  group
    .selectAll('text')
    .data(at.columns.filter(({ position }) => position % every === 0))
    .join('text')
    .attr('x', (column) => column.x + (column.labelled ? 6 : 0))
    .attr('y', at.height - 14)
    .text(({ position, labelled }) => (labelled ? `head ${position}` : `h${position}`))
}

export function markHeads(svg: Svg, marks: Marks, shown: readonly number[]): void {
  setClasses<Head>(svg, '.cells .row > g', ({ node, value }) => {
    return `chip head ${value < 0 ? 'subtracts' : 'adds'}${markClass(node, marks)}`
  })
  setClasses<{ layer: number }>(svg, '.rows text', ({ layer }) =>
    shown.includes(layer) ? 'shown' : '',
  )
}

/** The legend, from the most negative to the most positive value. */
export function drawHeadLegend(svg: Svg, at: Layout, of: Heads): void {
  const group = groupNamed(svg, 'legend')
  const y = at.height
  const start = 46 + of.measure.length * 5.6 + 14
  const keys = [
    { kind: 'subtracts', text: of.format(-of.largest) },
    { kind: 'none', text: '0' },
    { kind: 'adds', text: of.format(of.largest) },
  ].map((key, i) => ({ ...key, x: start + i * 68 }))
  group
    .selectAll('rect')
    .data(keys)
    .join('rect')
    .attr('class', (key) => `head-key ${key.kind}`)
    .attr('x', (key) => key.x)
    .attr('y', y)
    .attr('width', 66)
    .attr('height', 18)
    .attr('rx', 3)
  const text = [
    { x: 46, y: y + 9.5, text: of.measure, anchor: 'start', style: 'column' },
    ...keys.map((key) => ({
      x: key.x + 33,
      y: y + 9.5,
      text: key.text,
      anchor: 'middle',
      style: '',
    })),
  ]
  const sent = of.heads.length === at.rows.length * of.columns
  const note = {
    x: 46,
    y: y + 9.5 + LEGEND_LINE,
    text: 'dotted: not in this trace',
    anchor: 'start',
    style: 'column',
  }
  if (!sent) text.push(note)
  group
    .selectAll('text')
    .data(text)
    .join('text')
    .attr('class', (w) => w.style)
    .attr('x', (w) => w.x)
    .attr('y', (w) => w.y)
    .attr('text-anchor', (w) => w.anchor)
    .attr('dominant-baseline', 'central')
    .text((w) => w.text)
}
