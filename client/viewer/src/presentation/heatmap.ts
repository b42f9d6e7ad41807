import { create, type Selection, select } from 'd3-selection'
import { cut, fitted, isolated } from '../model/tokens'
import { BINS, type Paint } from './colours'
import {
  CHARACTER,
  charactersIn,
  type Group,
  GUTTER,
  groupNamed,
  needsRedraw,
  type Svg,
} from './svg'

// A heat map with one or two lines of text per cell.

export interface HeatColumn {
  key: string
  label: string
  x: number
  width: number
  labelled: boolean
  selected: boolean
}

export interface HeatRow {
  key: string
  label: string
  selected: boolean
}

export interface Line {
  /** Symbol left of the text, also of right-to-left text. */
  mark: string
  text: string
  strong: boolean
}

export interface HeatCell {
  /** The id that a click selects; '' if the cell is not selectable. */
  id: string
  lines: Line[]
  /** Small text in the upper right corner, if there is room. */
  corner: string
  /** A CSS class, or a fill and text colour. */
  paint: string | Paint
  sentence: string
  selected: boolean
  /** Whether a search found the cell; undefined if there is no search. */
  found: boolean | undefined
}

export interface HeatMap {
  columns: HeatColumn[]
  /** From top to bottom. */
  rows: HeatRow[]
  cellHeight: number
  width: number
  cell: (row: string, column: string) => HeatCell | undefined
}

/** The legend; a different `key` or number of lines causes a redraw. */
export interface Legend {
  key: string
  /** Lines, one unless given. */
  lines?: number
  draw: (group: Group) => void
}

interface Placed {
  x: number
  y: number
  width: number
  height: number
  labelled: boolean
  cell: HeatCell | undefined
}

type Chip = Selection<SVGGElement, unknown, null, undefined>

/** The smallest readable width: ten labelled columns and room for the others. */
export function narrowest(columns: number): number {
  return GUTTER + Math.min(columns, LENS) * LABELLED + (columns > LENS ? UNLABELLED : 0)
}

const LENS = 10
const LABELLED = 62 // px
const UNLABELLED = 80
const GAP = 4
const TOP = 4
const AXIS = 24
const LEGEND = 28 // px of a legend of one line
export const LEGEND_LINE = 20 // px from a line of a legend to the next
const MARK = 10
const ROOMY = 84 // px; narrower cells have less padding

export function heatPicture(name: string): Svg {
  const made = create('svg').attr('class', 'picture heat').attr('role', 'group')
  return made.attr('aria-label', name) as unknown as Svg
}

/** Draws the map and the legend below it. */
export function drawHeatMap(svg: Svg, map: HeatMap, legend?: Legend): void {
  const { columns, rows, cellHeight, width } = map
  const axis = TOP + rows.length * (cellHeight + GAP)
  const lines = legend?.lines ?? 1
  const height = axis + AXIS + (legend ? LEGEND + (lines - 1) * LEGEND_LINE : 0)
  if (needsRedraw(svg.node() as Element, `${width} ${height}`)) {
    // For printing, the viewBox scales the picture to the paper.
    svg.attr('width', width).attr('height', height).attr('viewBox', `0 0 ${width} ${height}`)
  }
  drawCells(groupNamed(svg, 'cells'), map)
  drawPart(svg, 'rows', [rows, cellHeight], (group) => drawRows(group, map))
  drawPart(svg, 'axis', [columns, axis], (group) => drawAxis(group, map, axis + 12))
  if (!legend) return
  drawPart(svg, 'legend', [legend.key, lines, axis], (group) => {
    legend.draw(group.attr('transform', `translate(${GUTTER},${axis + AXIS + 4})`))
  })
}

function drawPart(svg: Svg, name: string, given: unknown, draw: (group: Group) => void): void {
  const group = groupNamed(svg, name)
  if (needsRedraw(group.node() as Element, JSON.stringify(given))) draw(group)
}

/** Draws only changed cells: a selection changes two of several hundred. */
function drawCells(group: Group, map: HeatMap): void {
  group
    .selectAll<SVGGElement, Placed>('g.chip')
    .data(placed(map))
    .join((enter) => {
      const made = enter.append('g')
      made.append('rect')
      for (const line of ['line-0', 'line-1']) {
        const text = made.append('text').attr('class', line).attr('dominant-baseline', 'central')
        text.append('tspan').attr('class', 'mark')
        text.append('tspan').attr('class', 'body')
      }
      return made
    })
    .filter(function (p) {
      return needsRedraw(this, JSON.stringify(p))
    })
    .each(function (p) {
      drawCell(select(this), p)
    })
}

function placed(map: HeatMap): Placed[] {
  return map.rows.flatMap((row, i) =>
    map.columns.map(({ key, x, width, labelled }) => ({
      x,
      y: TOP + i * (map.cellHeight + GAP),
      width: Math.max(1, width),
      height: map.cellHeight,
      labelled,
      cell: map.cell(row.key, key),
    })),
  )
}

function chipClass(cell: HeatCell | undefined): string {
  if (!cell) return 'chip empty'
  const classes = ['chip', typeof cell.paint === 'string' ? cell.paint : 'painted']
  if (cell.selected) classes.push('selected')
  if (cell.found !== undefined) classes.push(cell.found ? 'found' : 'dim')
  return classes.join(' ')
}

function drawCell(chip: Chip, p: Placed): void {
  const { cell } = p
  const paint = cell && typeof cell.paint !== 'string' ? cell.paint : undefined
  const lines = p.labelled ? (cell?.lines ?? []) : []
  placeCell(chip, p, lines)
  chip
    .attr('class', chipClass(cell))
    .attr('data-id', cell?.id || null)
    .attr('tabindex', cell?.id ? '-1' : null)
    .attr('role', cell ? (cell.id ? 'button' : 'img') : null)
    .attr('aria-pressed', cell?.id ? String(cell.selected) : null)
  chip.select('rect').style('fill', paint?.fill ?? '')
  const text = [0, 1].map((i) => drawLine(chip, p, lines[i], i))
  drawCorner(chip, p)
  chip.selectAll('text').style('fill', paint?.ink ?? '')
  // The visible text comes first, as voice control requires (WCAG 2.5.3).
  chip.attr('aria-label', cell ? [...text, cell.sentence].join(' ').trim() : null)
}

/** Positions a cell and its text, unless they are already in place. */
function placeCell(chip: Chip, p: Placed, lines: readonly Line[]): void {
  const { x, y, width, height } = p
  const rect = chip.select('rect')
  const marks = lines.map((line) => line.mark !== '')
  if (!needsRedraw(rect.node() as Element, [x, y, width, height, ...marks].join())) return
  chip.attr('transform', `translate(${x},${y})`)
  rect
    .attr('width', width)
    .attr('height', height)
    .attr('rx', Math.min(4, width / 4))
  for (const i of [0, 1]) {
    const text = chip.select(`.line-${i}`)
    text.attr('y', lines.length > 1 ? height * (0.29 + 0.44 * i) : height / 2)
    text.select('.mark').attr('x', padding(width))
    text.select('.body').attr('x', padding(width) + (marks[i] ? MARK : 0))
  }
}

/** Draws one line and returns its visible text. */
function drawLine(chip: Chip, p: Placed, line: Line | undefined, i: number): string {
  const { mark = '', text = '', strong = false } = line ?? {}
  const corner = i === 0 ? cornerOf(p).length * CHARACTER : 0
  const room = p.width - 2 * padding(p.width) - (mark ? MARK : 0) - corner
  const shown = cut(text, charactersIn(room))
  const drawn = chip.select(`.line-${i}`).style('font-weight', strong ? '700' : '')
  drawn.select('.mark').text(mark && `${mark} `)
  drawn.select('.body').text(isolated(shown))
  return mark ? `${mark} ${shown}` : shown
}

function padding(width: number): number {
  return width < ROOMY ? 4 : 7
}

function cornerOf({ labelled, width, cell }: Placed): string {
  return labelled && width >= ROOMY ? (cell?.corner ?? '') : ''
}

function drawCorner(chip: Chip, p: Placed): void {
  const text = cornerOf(p)
  chip
    .selectAll('text.corner')
    .data(text === '' ? [] : [text])
    .join('text')
    .attr('class', 'corner')
    .attr('x', p.width - 5)
    .attr('y', p.height > 30 ? p.height * 0.29 : p.height / 2)
    .attr('text-anchor', 'end')
    .attr('dominant-baseline', 'central')
    .text((corner) => corner)
}

function drawRows(group: Group, map: HeatMap): void {
  group
    .selectAll('text')
    .data(map.rows)
    .join('text')
    .attr('class', (row) => (row.selected ? 'shown' : ''))
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
    .attr('class', (column) => (column.selected ? 'selected' : ''))
    .attr('x', (column) => column.x + padding(column.width))
    .attr('y', y)
    .text((column) => fitted(column.label, charactersIn(column.width - padding(column.width))))
}

// The legend of ranks is a part of the picture, so that an exported picture has it.

const BIN = 60 // px from a bin to the next

/** The legend of rank bins below a picture of this width. */
export function rankLegend(width: number): Legend {
  const perLine = Math.max(1, Math.min(BINS.length, Math.floor((width - GUTTER) / BIN)))
  const lines = Math.ceil(BINS.length / perLine)
  return { key: `ranks ${perLine}`, lines, draw: (group) => drawBins(group, perLine) }
}

function drawBins(group: Group, perLine: number): void {
  const x = (bin: number) => (bin % perLine) * BIN
  const y = (bin: number) => Math.floor(bin / perLine) * LEGEND_LINE
  group
    .selectAll('rect')
    .data(BINS)
    .join('rect')
    .attr('class', (_, bin) => `key bin-${bin}`)
    .attr('x', (_, bin) => x(bin))
    .attr('y', (_, bin) => y(bin))
    .attr('width', BIN - 2)
    .attr('height', 18)
    .attr('rx', 3)
  group
    .selectAll('text')
    .data(BINS)
    .join('text')
    .attr('class', (_, bin) => `on-bin-${bin}`)
    .attr('x', (_, bin) => x(bin) + BIN / 2 - 1)
    .attr('y', (_, bin) => y(bin) + 9.5)
    .attr('text-anchor', 'middle')
    .attr('dominant-baseline', 'central')
    .text((text) => text)
}
