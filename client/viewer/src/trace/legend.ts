// What the colours and lines mean, inside the picture: it is right in a talk too.
import { BINS } from '../colour/bins'
import { cut } from '../label/visible'
import { type Svg, stratum } from '../parts/svg'

interface Key {
  x: number
  width: number
  kind: string
  words: string
  inside: boolean
}

export const LEGEND_HEIGHT = 34

export function drawLegend(svg: Svg, target: string, y: number, width: number): void {
  const keys = keysFor(target, width)
  const group = stratum(svg, 'legend')
  group
    .selectAll('rect')
    .data(keys.filter((key) => key.kind !== ''))
    .join('rect')
    .attr('class', (key) => `key ${key.kind}`)
    .attr('x', (key) => key.x)
    .attr('y', (key) => (key.inside ? y : y + 5))
    .attr('width', (key) => (key.inside ? key.width : 16))
    .attr('height', (key) => (key.inside ? 18 : 8))
    .attr('rx', 3)
  group
    .selectAll('text')
    .data(keys)
    .join('text')
    .attr('class', (key) => (key.inside ? `on-${key.kind}` : 'column'))
    .attr('x', (key) => (key.inside ? key.x + key.width / 2 : key.x + (key.kind ? 22 : 0)))
    .attr('y', y + 9.5)
    .attr('text-anchor', (key) => (key.inside ? 'middle' : 'start'))
    .attr('dominant-baseline', 'central')
    .text((key) => key.words)
}

function keysFor(target: string, width: number): Key[] {
  const title = `rank of ${cut(target, 14)}`
  let x = 46
  const keys: Key[] = [{ x, width: 0, kind: '', words: title, inside: false }]
  x += title.length * 6.6 + 12
  BINS.forEach((words, bin) => {
    keys.push({ x, width: 58, kind: `bin-${bin}`, words, inside: true })
    x += 60
  })
  x += 18
  const lines: [string, string][] = [
    ['attention', 'attention (width: share)'],
    ['mlp', 'MLP'],
    ['residual', 'residual (width: norm)'],
  ]
  for (const [kind, words] of lines) {
    if (x + 30 + words.length * 6.6 > width) break
    keys.push({ x, width: 16, kind, words, inside: false })
    x += 22 + words.length * 5.6 + 16
  }
  return keys
}
