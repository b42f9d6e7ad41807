// What the colours mean, below the picture and within it.
import { normSteps } from '../colour/norms'
import { isDark } from '../page/theme'
import { measure } from '../parts/numbers'
import { type Svg, stratum } from '../parts/svg'
import { GUTTER } from '../trace/overview/layout'

const STEPS = 24
const WIDTH = 5

/** The scale of the norms with its domain, appended below a heat map of this height. */
export function drawNormLegend(svg: Svg, largest: number): void {
  const top = Number(svg.attr('height'))
  svg.attr('height', top + 26)
  const group = stratum(svg, 'legend')
  group.attr('transform', `translate(${GUTTER},${top + 4})`)
  group
    .selectAll('rect')
    .data(normSteps(isDark(), STEPS))
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
