// The panel beside the grid: how the target emerges at the selected position, row by row, and where
// it is on top for good.
import type { FlowGraph } from '../../graph/graph'
import type { GraphNode } from '../../graph/nodes'
import { cut } from '../../label/visible'
import { count, probability } from '../../parts/numbers'
import { type Svg, stratum } from '../../parts/svg'
import { type AnswerStep, answerAppears } from '../answer'
import { type Column, EMBEDDING, type Layout, type Row } from './layout'

interface Line {
  y: number
  node: GraphNode
  rank: number
  probability: number
}

const RANK = 46
const BAR = 58
const BAR_WIDTH = 84

export function drawPanel(svg: Svg, graph: FlowGraph, at: Layout, position: number): void {
  const lines = linesOf(graph, at, position)
  const x = at.panelX
  heading(svg, graph, at, position)
  const ranks = stratum(svg, 'ranks').selectAll('text').data(lines).join('text')
  ranks
    .attr('x', x + RANK)
    .attr('y', (line) => line.y)
    .attr('text-anchor', 'end')
    .attr('dominant-baseline', 'central')
    .attr('class', (line) => (line.rank === 0 ? 'number strong' : 'number'))
    .text((line) => count(line.rank))
  const bars = stratum(svg, 'probabilities').selectAll('rect').data(lines).join('rect')
  bars
    .attr('x', x + BAR)
    .attr('y', (line) => line.y - 5)
    .attr('width', (line) => Math.max(1, BAR_WIDTH * line.probability))
    .attr('height', 10)
    .attr('rx', 2)
  const numbers = stratum(svg, 'probability-numbers').selectAll('text').data(lines).join('text')
  numbers
    .attr('x', (line) => x + BAR + BAR_WIDTH * line.probability + 6)
    .attr('y', (line) => line.y)
    .attr('dominant-baseline', 'central')
    .attr('class', 'number')
    .text((line) => probability(line.probability))
}

function linesOf(graph: FlowGraph, at: Layout, position: number): Line[] {
  const lines: Line[] = []
  for (const row of at.rows) {
    const node =
      row.layer === EMBEDDING
        ? graph.node(`p${position}/BLOCK_INPUT`)
        : graph.at(row.layer, position, 'BLOCK_OUTPUT')
    const reading = node?.reading
    if (!node || reading?.targetRank === undefined) continue
    lines.push({
      y: row.y + at.cellHeight / 2,
      node,
      rank: reading.targetRank,
      probability: reading.targetProbability ?? 0,
    })
  }
  return lines
}

function heading(svg: Svg, graph: FlowGraph, at: Layout, position: number): void {
  const target = graph.targets.get(position)?.target.label ?? ''
  const words = [
    { x: at.panelX + RANK, text: 'rank', anchor: 'end' },
    { x: at.panelX + BAR, text: `probability of ${cut(target, 12)}`, anchor: 'start' },
  ]
  stratum(svg, 'panel-heading')
    .selectAll('text')
    .data(words)
    .join('text')
    .attr('class', 'column')
    .attr('x', (w) => w.x)
    .attr('y', 14)
    .attr('text-anchor', (w) => w.anchor)
    .text((w) => w.text)
}

/** Where the target comes to stay on top: a tinted column from there up, and a flag beside it. */
export function drawAnswer(svg: Svg, graph: FlowGraph, at: Layout, position: number): void {
  const answer = answerAppears(graph, position)
  const layer = answer?.step === 'embedding' ? EMBEDDING : answer?.layer
  const row = answer && at.rows.find((r) => r.layer === layer)
  const column = at.columns.find((c) => c.position === position)
  const marks = answer && row && column ? [{ row, column, words: flagWords(answer.step) }] : []
  const bottom = (mark: Mark) => mark.row.y + at.cellHeight
  stratum(svg, 'answer')
    .selectAll('rect')
    .data(marks)
    .join('rect')
    .attr('class', 'answer-band')
    .attr('x', (m) => m.column.x - 6)
    .attr('width', (m) => m.column.width + 12)
    .attr('y', 22)
    .attr('height', (m) => bottom(m) + 6 - 22)
    .attr('rx', 10)
  const flag = stratum(svg, 'flag')
  flag
    .selectAll('path')
    .data(marks)
    .join('path')
    .attr('class', 'flag-line')
    .attr('d', (m) => `M${m.column.x + m.column.width + 6},${bottom(m) + 5}H${at.panelX + 12}`)
  flag
    .selectAll('rect')
    .data(marks)
    .join('rect')
    .attr('class', 'flag-box')
    .attr('x', at.panelX + 10)
    .attr('y', (m) => bottom(m) - 4)
    .attr('width', (m) => m.words.length * 5.9 + 22)
    .attr('height', 18)
    .attr('rx', 9)
  flag
    .selectAll('text')
    .data(marks)
    .join('text')
    .attr('class', 'flag-text')
    .attr('x', at.panelX + 20)
    .attr('y', (m) => bottom(m) + 5.5)
    .attr('dominant-baseline', 'central')
    .text((m) => m.words)
}

interface Mark {
  row: Row
  column: Column
  words: string
}

const AFTER: Record<AnswerStep, string> = {
  embedding: 'from the start',
  attention: 'after attention',
  MLP: 'after the MLP',
  block: 'after the block',
}

function flagWords(step: AnswerStep): string {
  return `▲ on top, ${AFTER[step]}`
}
