import { type Svg, stratum } from '../../parts/svg'
import type { Layout } from '../overview/layout'
import type { Heads } from './model'

/** What the cells' colours mean, from what subtracts most to what adds most. */
export function drawHeadLegend(svg: Svg, at: Layout, of: Heads): void {
  const group = stratum(svg, 'legend')
  const y = at.height
  const start = 46 + of.measure.length * 5.6 + 14
  const keys = [
    { kind: 'subtracts', words: of.words(-of.largest) },
    { kind: 'none', words: '0' },
    { kind: 'adds', words: of.words(of.largest) },
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
  const words = [
    { x: 46, text: of.measure, anchor: 'start', style: 'column' },
    ...keys.map((key) => ({ x: key.x + 33, text: key.words, anchor: 'middle', style: '' })),
  ]
  const sent = of.heads.length === at.rows.length * of.columns
  const note = { x: start + 220, text: 'dotted: not sent', anchor: 'start', style: 'column' }
  if (!sent) words.push(note)
  group
    .selectAll('text')
    .data(words)
    .join('text')
    .attr('class', (w) => w.style)
    .attr('x', (w) => w.x)
    .attr('y', y + 9.5)
    .attr('text-anchor', (w) => w.anchor)
    .attr('dominant-baseline', 'central')
    .text((w) => w.text)
}
