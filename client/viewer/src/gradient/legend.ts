// What the colours mean, below each picture and within it.
import { BINS } from '../colour/bins'
import { normSteps } from '../colour/norms'
import { measure } from '../parts/numbers'
import type { Group } from '../parts/svg'
import type { Legend } from './heatmap'

const STEPS = 24
const WIDTH = 5
const BIN = 58

/** The scale of the norms with its domain. */
export function normLegend(largest: number): Legend {
  return { key: String(largest), draw: (group) => drawNorms(group, largest) }
}

/** The bins of the ranks. */
export function rankLegend(): Legend {
  return { key: 'ranks', draw: drawBins }
}

function drawNorms(group: Group, largest: number): void {
  group
    .selectAll('rect')
    .data(normSteps(STEPS))
    .join('rect')
    .attr('x', (_, i) => 14 + i * WIDTH)
    .attr('width', WIDTH + 0.5)
    .attr('height', 12)
    .style('fill', (colour) => colour)
  const end = 14 + STEPS * WIDTH + 8
  group
    .selectAll('text')
    .data([
      { x: 0, words: '0' },
      { x: end, words: `${measure(largest)} · |δ|, square-root scale` },
    ])
    .join('text')
    .attr('class', 'column')
    .attr('x', (label) => label.x)
    .attr('y', 10)
    .text((label) => label.words)
}

function drawBins(group: Group): void {
  group
    .selectAll('rect')
    .data(BINS)
    .join('rect')
    .attr('class', (_, bin) => `key bin-${bin}`)
    .attr('x', (_, bin) => bin * (BIN + 2))
    .attr('width', BIN)
    .attr('height', 18)
    .attr('rx', 3)
  group
    .selectAll('text')
    .data(BINS)
    .join('text')
    .attr('class', (_, bin) => `on-bin-${bin}`)
    .attr('x', (_, bin) => bin * (BIN + 2) + BIN / 2)
    .attr('y', 9.5)
    .attr('text-anchor', 'middle')
    .attr('dominant-baseline', 'central')
    .text((words) => words)
}
