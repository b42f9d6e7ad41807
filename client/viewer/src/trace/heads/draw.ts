import { select } from 'd3-selection'
import type { FlowGraph } from '../../graph/graph'
import { cut } from '../../label/visible'
import { type Marks, markClass } from '../../parts/look'
import { classify, defineHatches, fitting, type Group, type Svg, stratum } from '../../parts/svg'
import { nodeSentence } from '../../parts/words'
import { drawRowLabels } from '../overview/draw'
import type { Layout } from '../overview/layout'
import type { Head, Heads } from './model'

const STRONGEST = 0.55 // opacity: text stays readable on it
const TWO_LINES = 32 // px: what is lower has room for the token alone

export function drawHeads(svg: Svg, graph: FlowGraph, at: Layout, of: Heads): void {
  defineHatches(svg)
  drawAbsent(stratum(svg, 'absent'), at, of)
  drawCells(stratum(svg, 'cells'), graph, at, of)
  drawRowLabels(stratum(svg, 'rows'), at)
  drawAxis(stratum(svg, 'axis'), at)
}

/** Where the selection left a head out. */
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

/** Rows of cells, since that is what a grid is to a screen reader. */
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

/** Gives what is written in the cell, one behind the other. */
function placeCell(group: SVGGElement, cell: Head, at: Layout, of: Heads): string {
  const column = at.columns[cell.head]
  const row = at.rows.find(({ layer }) => layer === cell.layer)
  if (!column || !row) return ''
  const part = Math.abs(cell.value) / of.largest
  const own = select(group).attr('transform', `translate(${column.x},${row.y})`)
  own
    .select('rect')
    .attr('width', column.width)
    .attr('height', at.cellHeight)
    .attr('fill-opacity', STRONGEST * part)
  const label = cell.node.reading?.top[0]?.token.label ?? ''
  const token = column.labelled && at.cellHeight >= 11 ? cut(label, fitting(column.width - 11)) : ''
  const two = at.cellHeight >= TWO_LINES && token !== ''
  const lines = [
    { words: token, style: '', y: at.cellHeight * (two ? 0.3 : 0.47) },
    { words: two ? of.words(cell.value) : '', style: 'number', y: at.cellHeight * 0.66 },
  ]
  own
    .selectAll('text')
    .data(lines.filter(({ words }) => words !== ''))
    .join('text')
    .attr('class', (line) => line.style)
    .attr('x', 6)
    .attr('y', (line) => line.y)
    .attr('dominant-baseline', 'central')
    .text((line) => line.words)
  own
    .selectAll('path')
    .data([part])
    .join('path')
    .attr('d', `M0,${at.cellHeight - 3}h${part * column.width}v3h${-part * column.width}z`)
  return two ? `${token}${of.words(cell.value)}` : `${token} ${of.words(cell.value)}`
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
  classify<Head>(svg, '.cells .row > g', ({ node, value }) => {
    return `chip head ${value < 0 ? 'subtracts' : 'adds'}${markClass(node, marks)}`
  })
  classify<{ layer: number }>(svg, '.rows text', ({ layer }) =>
    shown.includes(layer) ? 'shown' : '',
  )
}
