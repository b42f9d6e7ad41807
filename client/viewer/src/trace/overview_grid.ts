import { select } from 'd3-selection'
import { finite } from '../contract'
import type { FlowGraph, GraphNode } from '../model/flow_graph'
import { cut, fitted, isolated } from '../model/tokens'
import { BINS, binOf, chipClass, type Marks } from '../presentation/colours'
import {
  type Column,
  charactersIn,
  defineHatches,
  type Group,
  groupNamed,
  NARROWEST_LABEL,
  type Svg,
  setClasses,
} from '../presentation/svg'
import { nodeSentence } from '../presentation/wording'
import { arcClass, arcsOf, drawArcs, type SizedArc } from './arcs'
import { type Filter, passes } from './controls'
import { EMBEDDING, type Layout, type Row } from './overview_layout'

/** Room left and right of a cell's text. */
function paddingIn(column: Column): number {
  return column.width < NARROWEST_LABEL ? 4 : 6
}

/** One residual of the overview. */
export interface Cell {
  column: Column
  row: Row
  node: GraphNode | undefined
}

export interface Grid {
  graph: FlowGraph
  at: Layout
  /** The position that is explained. */
  position: number
  filter: Filter
}

export function residualAt(graph: FlowGraph, layer: number, position: number) {
  return layer === EMBEDDING
    ? graph.node(`p${position}/BLOCK_INPUT`)
    : graph.at(layer, position, 'BLOCK_OUTPUT')
}

export function drawGrid(svg: Svg, grid: Grid): void {
  const { at } = grid
  defineHatches(svg)
  svg.attr('width', at.width).attr('height', at.height)
  svg.attr('viewBox', `0 0 ${at.width} ${at.height}`)
  drawBand(groupNamed(svg, 'band'), grid)
  drawHeatmap(groupNamed(svg, 'heat'), grid)
  groupNamed(svg, 'answer') // reserves its place below the cells
  drawSpine(groupNamed(svg, 'spine'), grid)
  groupNamed(svg, 'arcs') // below the cells
  drawCells(groupNamed(svg, 'cells'), grid)
  drawFiltered(svg, grid)
  drawRowLabels(groupNamed(svg, 'rows'), at)
  drawAxis(groupNamed(svg, 'axis'), grid)
}

/** Draws what depends on the filter: the arcs, and the bars below the cells. */
export function drawFiltered(svg: Svg, grid: Grid): void {
  drawArcs(groupNamed(svg, 'arcs'), arcsOf(grid), grid.at)
  drawSteps(groupNamed(svg, 'steps'), grid)
}

function drawBand(group: Group, { at, position }: Grid): void {
  group
    .selectAll('rect')
    .data(at.columns.filter((c) => c.position === position))
    .join('rect')
    .attr('x', (c) => c.x - 6)
    .attr('width', (c) => c.width + 12)
    .attr('y', 22)
    .attr('height', at.height - 24)
    .attr('rx', 10)
}

interface Rung {
  column: Column
  below: Row
  above: Row
  width: number
}

/** The residual stream between adjacent cells; its width is the square root of its relative norm. */
function drawSpine(group: Group, grid: Grid): void {
  const { at, position } = grid
  group
    .selectAll('line')
    .data(rungsOf(grid))
    .join('line')
    .attr('class', (r) => (r.column.position === position ? 'rung selected' : 'rung'))
    .attr('x1', (r) => middle(r.column))
    .attr('x2', (r) => middle(r.column))
    .attr('y1', (r) => r.below.y)
    .attr('y2', (r) => r.above.y + at.cellHeight)
    .attr('stroke-width', (r) => r.width)
}

const WIDEST_RUNG = 12

function rungsOf({ graph, at }: Grid): Rung[] {
  const rungs: Rung[] = []
  let largest = 1e-9
  for (const column of at.columns) {
    if (!column.labelled) continue // too narrow to show a width
    for (let i = 1; i < at.rows.length; i++) {
      const [below, above] = [at.rows[i - 1], at.rows[i]]
      const node = below && residualAt(graph, below.layer, column.position)
      if (!below || !above || !node) continue
      largest = Math.max(largest, finite(node.norm))
      rungs.push({ column, below, above, width: finite(node.norm) })
    }
  }
  for (const rung of rungs) {
    const room = Math.min(WIDEST_RUNG, rung.column.width * 0.6)
    rung.width = Math.max(1, room * Math.sqrt(rung.width / largest))
  }
  return rungs
}

/** Cells grouped by row, as the ARIA grid pattern requires. */
function drawCells(group: Group, grid: Grid): void {
  const { graph, at } = grid
  const columns = at.columns.filter((column) => column.labelled)
  const rows = group
    .selectAll<SVGGElement, Row>('g.row')
    .data(at.rows, (row) => row.layer)
    .join('g')
    .attr('class', 'row')
    .attr('role', 'row')
  rows
    .selectAll<SVGGElement, Cell>('g')
    .data(
      (row) =>
        columns.map((column) => ({
          column,
          row,
          node: residualAt(graph, row.layer, column.position),
        })),
      (cell) => cell.column.position,
    )
    .join((enter) => {
      const cell = enter.append('g')
      cell.append('rect')
      cell.append('text').attr('dominant-baseline', 'central')
      return cell
    })
    .attr('data-id', (cell) => cell.node?.id ?? null)
    .attr('role', 'gridcell')
    .attr('tabindex', -1)
    .attr('aria-label', (cell) => spoken(cell, graph))
    .attr('transform', (cell) => `translate(${cell.column.x},${cell.row.y})`)
    .each(function (cell) {
      const own = select(this)
      own
        .select('rect')
        .attr('width', cell.column.width)
        .attr('height', at.cellHeight)
        .attr('rx', Math.min(6, at.cellHeight / 4))
      own
        .select('text')
        .attr('x', paddingIn(cell.column))
        .attr('y', at.cellHeight / 2 + 0.5)
        .text(at.cellHeight < 11 ? '' : isolated(cellLabel(cell)))
    })
}

/** The accessible name: the sentence, and the visible text if the label is truncated. */
function spoken(cell: Cell, graph: FlowGraph): string {
  if (!cell.node) return 'not in this trace'
  const seen = cellLabel(cell)
  const sentence = nodeSentence(cell.node, graph)
  return sentence.includes(seen) ? sentence : `${sentence}, shown as ${seen}`
}

function cellLabel(cell: Cell): string {
  const label = cell.node?.reading?.top[0]?.token.label ?? ''
  return cut(label, charactersIn(cell.column.width - 2 * paddingIn(cell.column)))
}

interface Underline {
  x: number
  y: number
  width: number
  kind: string
}

/** Bars below each cell: the shares of attention and the MLP. */
function drawSteps(group: Group, grid: Grid): void {
  const { at } = grid
  const lines: Underline[] = []
  if (at.cellHeight >= 14) {
    for (const row of at.rows) {
      for (const column of at.columns) {
        if (column.labelled && row.layer !== EMBEDDING) underline(lines, grid, row, column)
      }
    }
  }
  group
    .selectAll('rect')
    .data(lines)
    .join('rect')
    .attr('class', (line) => line.kind)
    .attr('x', (line) => line.x)
    .attr('y', (line) => line.y)
    .attr('width', (line) => line.width)
    .attr('height', 2.5)
}

function underline(lines: Underline[], grid: Grid, row: Row, column: Column): void {
  const { graph, at, filter } = grid
  const y = row.y + at.cellHeight + 1.5
  const room = column.width - 12
  let x = column.x + 6
  for (const [sublayer, kind] of [
    ['ATTENTION_OUTPUT', 'attention'],
    ['MIXER_OUTPUT', 'attention'],
    ['MLP_OUTPUT', 'mlp'],
  ] as const) {
    const output = graph.at(row.layer, column.position, sublayer)
    const share = output && graph.edgesFrom(output.id).find((e) => e.kind === 'PART')?.share
    const width = Math.min(1, Math.abs(finite(share))) * room * 0.5
    if (filter.hidden.has(kind) || !passes(finite(share), filter)) continue
    if (width > 0.5) lines.push({ x, y, width, kind })
    x += width
  }
}

export function drawRowLabels(group: Group, at: Layout): void {
  const every = Math.ceil(13 / (at.rows.length > 1 ? Math.abs(pitch(at)) : 13))
  group
    .selectAll('text')
    .data(at.rows.filter((row) => row.layer === EMBEDDING || row.layer % every === 0))
    .join('text')
    .attr('x', 36)
    .attr('y', (row) => row.y + at.cellHeight / 2)
    .attr('text-anchor', 'end')
    .attr('dominant-baseline', 'central')
    .text((row) => (row.layer === EMBEDDING ? 'emb' : `L${row.layer}`))
}

function pitch(at: Layout): number {
  return (at.rows[0]?.y ?? 0) - (at.rows[1]?.y ?? 0)
}

function drawAxis(group: Group, { graph, at, position }: Grid): void {
  const y = at.height - 14
  group
    .selectAll('text')
    .data(at.columns.filter((column) => column.labelled))
    .join('text')
    .attr('class', (column) => (column.position === position ? 'selected' : ''))
    .attr('x', (column) => column.x + paddingIn(column))
    .attr('y', y)
    .text((column) => {
      const label = graph.prompt[column.position]?.label ?? ''
      return fitted(label, charactersIn(column.width - 6))
    })
}

function middle(column: Column): number {
  return column.x + column.width / 2
}

// Columns that are too narrow for text share one path per colour: seven elements for thousands of
// cells, which also export and print.

/** The outlines of all unlabelled cells, by bin. */
export function heatPaths({ graph, at }: Grid): string[] {
  const paths = BINS.map(() => '')
  for (const column of at.columns) {
    if (column.labelled) continue
    for (const row of at.rows) {
      const node = residualAt(graph, row.layer, column.position)
      if (!node) continue
      const width = column.width.toFixed(2)
      paths[binOf(node, graph)] +=
        `M${column.x.toFixed(2)},${row.y}h${width}v${at.cellHeight}h-${width}z`
    }
  }
  return paths
}

export function drawHeatmap(group: Group, grid: Grid): void {
  group
    .selectAll('path')
    .data([...heatPaths(grid), unreadPath(grid)])
    .join('path')
    .attr('class', (_, bin) => (bin < BINS.length ? `heat-${bin}` : 'unread'))
    .attr('d', (path) => path)
}

/** The outline of the unlabelled columns that the stream does not contain, one box per run. */
function unreadPath({ graph, at }: Grid): string {
  const [top, bottom] = [at.rows.at(-1)?.y ?? 0, (at.rows[0]?.y ?? 0) + at.cellHeight]
  const layer = at.rows.at(-1)?.layer ?? EMBEDDING
  const missing = (column: Column | undefined) =>
    column && !column.labelled && !residualAt(graph, layer, column.position)
  let path = ''
  let start: Column | undefined
  at.columns.forEach((column, i) => {
    if (missing(column)) start ??= column
    if (start && !missing(at.columns[i + 1])) {
      path += `M${start.x},${top}H${column.x + column.width}V${bottom}H${start.x}z`
      start = undefined
    }
  })
  return path
}

// A selection, a search or an open layer changes only classes, so the layout stays.

export function markGrid(
  svg: Svg,
  graph: FlowGraph,
  position: number,
  marks: Marks,
  shown: readonly number[],
): void {
  setClasses<Cell>(svg, '.cells .row > g', (cell) => {
    const own = cell.column.position === position ? 'cell of-selected' : 'cell'
    return `${own} ${chipClass(cell.node, graph, marks)}`
  })
  setClasses<SizedArc>(svg, '.arcs path', (arc) => arcClass(arc, position, marks))
  setClasses<Row>(svg, '.rows text', (row) => (shown.includes(row.layer) ? 'shown' : ''))
}
