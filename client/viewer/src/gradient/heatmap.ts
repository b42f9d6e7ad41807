// A heat map: rows upward, columns along, one or two lines of text in a cell.
import { create, type Selection, select } from 'd3-selection'
import type { Paint } from '../colour/norms'
import { cut } from '../label/visible'
import { fitting, type Group, type Svg, stratum } from '../parts/svg'

export interface HeatColumn {
  key: string
  label: string
  x: number
  width: number
  labelled: boolean
}

export interface Line {
  text: string
  strong: boolean
}

export interface HeatCell {
  /** What a click selects; '' for a cell that is only looked at. */
  id: string
  lines: Line[]
  /** A class that colours it, or a colour and the ink on it. */
  paint: string | Paint
  sentence: string
  selected: boolean
}

export interface HeatMap {
  columns: HeatColumn[]
  /** From the top. */
  rows: { key: string; label: string }[]
  cellHeight: number
  width: number
  cell: (row: string, column: string) => HeatCell | undefined
}

interface Placed {
  x: number
  y: number
  width: number
  labelled: boolean
  cell: HeatCell | undefined
}

const GAP = 4
const TOP = 4
const AXIS = 24
const PAD = 7

export function heatPicture(name: string): Svg {
  const made = create('svg').attr('class', 'picture heat').attr('role', 'group')
  return made.attr('aria-label', name) as unknown as Svg
}

export function drawHeatMap(svg: Svg, map: HeatMap): void {
  const height = TOP + map.rows.length * (map.cellHeight + GAP)
  svg.attr('width', map.width).attr('height', height + AXIS)
  drawCells(stratum(svg, 'cells'), map)
  drawRows(stratum(svg, 'rows'), map)
  drawAxis(stratum(svg, 'axis'), map, height + 12)
}

function drawCells(group: Group, map: HeatMap): void {
  group
    .selectAll<SVGGElement, Placed>('g.chip')
    .data(placed(map))
    .join((enter) => {
      const made = enter.append('g')
      made.append('rect')
      made.append('text').attr('class', 'line-0')
      made.append('text').attr('class', 'line-1')
      return made
    })
    .attr('class', (p) => chipClass(p.cell))
    .attr('transform', (p) => `translate(${p.x},${p.y})`)
    .attr('data-id', (p) => p.cell?.id || null)
    .attr('tabindex', (p) => (p.cell?.id ? '-1' : null))
    .attr('role', (p) => (p.cell ? (p.cell.id ? 'button' : 'img') : null))
    .attr('aria-pressed', (p) => (p.cell?.id ? String(p.cell.selected) : null))
    .each(function (p) {
      drawCell(select(this), p, map.cellHeight)
    })
}

function placed(map: HeatMap): Placed[] {
  return map.rows.flatMap((row, i) =>
    map.columns.map(({ key, x, width, labelled }) => ({
      x,
      y: TOP + i * (map.cellHeight + GAP),
      width,
      labelled,
      cell: map.cell(row.key, key),
    })),
  )
}

function chipClass(cell: HeatCell | undefined): string {
  if (!cell) return 'chip empty'
  const colour = typeof cell.paint === 'string' ? cell.paint : 'painted'
  return `chip ${colour}${cell.selected ? ' selected' : ''}`
}

function drawCell(
  chip: Selection<SVGGElement, unknown, null, undefined>,
  p: Placed,
  height: number,
): void {
  const paint = p.cell && typeof p.cell.paint !== 'string' ? p.cell.paint : undefined
  const lines = (p.labelled ? (p.cell?.lines ?? []) : []).map(({ text, strong }) => ({
    text: cut(text, fitting(p.width - 2 * PAD)),
    strong,
  }))
  // What is seen comes first: that is what a person says who speaks to the page.
  const spoken = [...lines.map(({ text }) => text), p.cell?.sentence ?? '']
  chip.attr('aria-label', p.cell ? spoken.join(' ').trim() : null)
  chip
    .select('rect')
    .attr('width', Math.max(1, p.width))
    .attr('height', height)
    .attr('rx', Math.min(4, p.width / 4))
    .style('fill', paint?.fill ?? '')
  for (const i of [0, 1]) {
    const line = lines[i]
    chip
      .select(`text.line-${i}`)
      .attr('x', PAD)
      .attr('y', lines.length > 1 ? height * (0.29 + 0.44 * i) : height / 2)
      .attr('dominant-baseline', 'central')
      .style('fill', paint?.ink ?? '')
      .style('font-weight', line?.strong ? '700' : '')
      .text(line?.text ?? '')
  }
}

function drawRows(group: Group, map: HeatMap): void {
  group
    .selectAll('text')
    .data(map.rows)
    .join('text')
    .attr('x', 36)
    .attr('y', (_, i) => TOP + i * (map.cellHeight + GAP) + map.cellHeight / 2)
    .attr('text-anchor', 'end')
    .attr('dominant-baseline', 'central')
    .text((row) => row.label)
}

function drawAxis(group: Group, map: HeatMap, y: number): void {
  group
    .selectAll('text')
    .data(map.columns.filter((column) => column.labelled))
    .join('text')
    .attr('x', (column) => column.x + PAD)
    .attr('y', y)
    .text((column) => cut(column.label, fitting(column.width - PAD)))
}
