import { type Selection, select } from 'd3-selection'
import { linkVertical } from 'd3-shape'
import { rankBin } from '../../colour/bins'
import type { FlowGraph } from '../../graph/graph'
import type { GraphNode } from '../../graph/nodes'
import { cut } from '../../label/visible'
import { nodeSentence } from '../../parts/words'
import { type Arc, arcsInto } from './arcs'
import { type Column, EMBEDDING, type Layout, type Row } from './layout'

type Svg = Selection<SVGSVGElement, unknown, null, undefined>
type Group = Selection<SVGGElement, unknown, null, undefined>

/** One residual of the grid. */
export interface Cell {
  column: Column
  row: Row
  node: GraphNode | undefined
}

const CHARACTER = 7.0 // width of one in the label's type size

export function cells(graph: FlowGraph, at: Layout): Cell[] {
  return at.rows.flatMap((row) =>
    at.columns.map((column) => ({ column, row, node: residualAt(graph, row, column) })),
  )
}

function residualAt(graph: FlowGraph, row: Row, column: Column): GraphNode | undefined {
  return row.layer === EMBEDDING
    ? graph.node(`p${column.position}/BLOCK_INPUT`)
    : graph.at(row.layer, column.position, 'BLOCK_OUTPUT')
}

export function drawGrid(svg: Svg, graph: FlowGraph, at: Layout, selected: number): void {
  drawBand(layer(svg, 'band'), at, selected)
  drawSpine(layer(svg, 'spine'), graph, at, selected)
  drawArcs(layer(svg, 'arcs'), graph, at, selected)
  drawCells(layer(svg, 'cells'), graph, at, selected)
  drawRowLabels(layer(svg, 'rows'), at)
  drawAxis(layer(svg, 'axis'), graph, at, selected)
}

/** The group of one name, made at its place the first time: later groups lie above earlier ones. */
function layer(svg: Svg, name: string): Group {
  const found = svg.select<SVGGElement>(`g.${name}`)
  return found.empty() ? svg.append('g').attr('class', name) : found
}

function drawBand(group: Group, at: Layout, selected: number): void {
  const column = at.columns.filter((c) => c.position === selected)
  group
    .selectAll('rect')
    .data(column)
    .join('rect')
    .attr('class', 'band-of-selected')
    .attr('x', (c) => c.x - 5)
    .attr('width', (c) => c.width + 10)
    .attr('y', 6)
    .attr('height', at.height - 12)
    .attr('rx', 10)
}

interface Rung {
  column: Column
  below: Row
  above: Row
  width: number
}

/** The residual stream between neighbouring cells, as wide as its norm. */
function drawSpine(group: Group, graph: FlowGraph, at: Layout, selected: number): void {
  const rungs = rungsOf(graph, at)
  group
    .selectAll('line')
    .data(rungs)
    .join('line')
    .attr('class', (r) => (r.column.position === selected ? 'spine selected' : 'spine'))
    .attr('x1', (r) => middle(r.column))
    .attr('x2', (r) => middle(r.column))
    .attr('y1', (r) => r.below.y)
    .attr('y2', (r) => r.above.y + at.cellHeight)
    .attr('stroke-width', (r) => r.width)
}

function rungsOf(graph: FlowGraph, at: Layout): Rung[] {
  const rungs: Rung[] = []
  for (const column of at.columns) {
    for (let i = 1; i < at.rows.length; i++) {
      const [below, above] = [at.rows[i - 1], at.rows[i]]
      const node = below && residualAt(graph, below, column)
      if (!below || !above || !node) continue
      const width = Math.min(column.width * 0.5, 1.5 + Math.sqrt(node.norm) * 0.9)
      rungs.push({ column, below, above, width })
    }
  }
  return rungs
}

function drawArcs(group: Group, graph: FlowGraph, at: Layout, selected: number): void {
  const others = at.columns.filter((c) => c.labelled && c.position !== selected)
  const arcs = [
    ...others.flatMap((column) => arcsInto(graph, column.position, 0.15)),
    ...arcsInto(graph, selected),
  ].filter((arc) => arc.source !== arc.position)
  group
    .selectAll<SVGPathElement, Arc>('path')
    .data(arcs, (arc) => arc.value)
    .join('path')
    .order()
    .attr('class', (arc) => (arc.position === selected ? 'arc into-selected' : 'arc'))
    .attr('data-id', (arc) => arc.value)
    .attr('d', (arc) => arcPath(arc, at))
    .attr('stroke-width', (arc) => 1 + 9 * Math.min(1, Math.abs(arc.share)))
    .attr('opacity', (arc) =>
      arc.position === selected ? 0.3 + 0.7 * Math.min(1, Math.abs(arc.share) * 2) : 0.1,
    )
}

const link = linkVertical<unknown, [number, number]>()

/** From the top of the residual that is read to the bottom of the one that is written. */
function arcPath(arc: Arc, at: Layout): string | null {
  const from = at.columns.find((c) => c.position === arc.source)
  const to = at.columns.find((c) => c.position === arc.position)
  const index = at.rows.findIndex((row) => row.layer === arc.layer)
  const [below, above] = [at.rows[index - 1], at.rows[index]]
  if (!from || !to || !below || !above) return null
  const start: [number, number] = [middle(from) + Math.min(12, from.width / 4), below.y]
  const end: [number, number] = [middle(to) - Math.min(14, to.width / 4), above.y + at.cellHeight]
  return link({ source: start, target: end })
}

function drawCells(group: Group, graph: FlowGraph, at: Layout, selected: number): void {
  const vocabulary = graph.vocabulary
  group
    .selectAll<SVGGElement, Cell>('g.cell')
    .data(cells(graph, at), (cell) => `${cell.row.layer}/${cell.column.position}`)
    .join((enter) => {
      const cell = enter.append('g')
      cell.append('rect')
      cell.append('text').attr('dominant-baseline', 'central')
      return cell
    })
    .attr('class', (cell) => `cell bin-${rankBin(cell.node?.reading?.targetRank, vocabulary)}`)
    .classed('empty', (cell) => cell.node === undefined)
    .classed('of-selected', (cell) => cell.column.position === selected)
    .attr('data-id', (cell) => cell.node?.id ?? null)
    .attr('role', 'gridcell')
    .attr('aria-label', (cell) => (cell.node ? nodeSentence(cell.node, graph) : 'not traced'))
    .attr('transform', (cell) => `translate(${cell.column.x},${cell.row.y})`)
    .each(function (cell) {
      const own = select(this)
      own
        .select('rect')
        .attr('width', Math.max(1, cell.column.width))
        .attr('height', at.cellHeight)
        .attr('rx', Math.min(6, cell.column.width / 4))
      own
        .select('text')
        .attr('x', 8)
        .attr('y', at.cellHeight / 2 + 0.5)
        .text(cell.column.labelled ? cellLabel(cell) : '')
    })
}

function cellLabel(cell: Cell): string {
  const label = cell.node?.reading?.top[0]?.token.label ?? ''
  return cut(label, Math.floor((cell.column.width - 12) / CHARACTER))
}

function drawRowLabels(group: Group, at: Layout): void {
  group
    .selectAll('text')
    .data(at.rows)
    .join('text')
    .attr('class', 'row-label')
    .attr('x', 36)
    .attr('y', (row) => row.y + at.cellHeight / 2)
    .attr('text-anchor', 'end')
    .attr('dominant-baseline', 'central')
    .text((row) => (row.layer === EMBEDDING ? 'emb' : `L${row.layer}`))
}

function drawAxis(group: Group, graph: FlowGraph, at: Layout, selected: number): void {
  const y = at.height - 26
  group
    .selectAll('text')
    .data(at.columns.filter((column) => column.labelled))
    .join('text')
    .attr('class', (column) => (column.position === selected ? 'axis selected' : 'axis'))
    .attr('x', (column) => column.x + 8)
    .attr('y', y)
    .text((column) => {
      const label = graph.prompt[column.position]?.label ?? ''
      return cut(label, Math.floor((column.width - 6) / CHARACTER))
    })
}

function middle(column: Column): number {
  return column.x + column.width / 2
}
