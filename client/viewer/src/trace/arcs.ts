import { finite } from '../contract'
import type { FlowGraph } from '../model/flow_graph'
import type { Marks } from '../presentation/colours'
import { figureName } from '../presentation/sentences'
import type { Column, Group } from '../presentation/svg'
import { at as atPosition } from '../presentation/wording'
import { type Filter, passes } from './controls'
import type { Layout } from './overview_layout'

// The overview's arcs: what attention moves from one token's residual to another's.

/** A head's attention from one position to another. */
export interface Arc {
  layer: number
  position: number
  source: number
  head: number
  /** The head's share of all heads times the source's share of the head; signed. */
  share: number
  /** What it adds to the logit of its position's target; undefined if the trace does not have it. */
  effect: number | undefined
  /** Id of the value node. */
  value: string
  /** Id of the head's output. */
  output: string
}

/** An arc with its width from 0 to 1; folded arcs come from the attention sink. */
export interface SizedArc extends Arc {
  size: number
  negative: boolean
  folded: boolean
}

export interface Place {
  graph: FlowGraph
  at: Layout
  position: number
  filter: Filter
}

const LEAST_EFFECT = 0.04 // of the largest effect at the selected position
const LEAST_SHARE = 0.01
const LEAST_ELSEWHERE = 0.2 // at other positions

/** All arcs into one position. */
export function arcsInto(graph: FlowGraph, position: number): Arc[] {
  const arcs: Arc[] = []
  for (const layer of graph.layers) {
    for (const head of graph.partsOf(`L${layer}/p${position}/ATTENTION_CONCAT`)) {
      for (const { node, edge } of graph.partsOf(head.node.id)) {
        if (node.source === undefined) continue
        arcs.push({
          layer,
          position,
          source: node.source,
          head: head.node.head ?? 0,
          share: finite(head.edge.share) * finite(edge.share),
          effect: edge.logitContribution,
          value: node.id,
          output: head.node.id,
        })
      }
    }
  }
  return arcs
}

/** The arcs to draw, the thinnest first, so that thick arcs are on top. */
export function arcsOf(place: Place): SizedArc[] {
  const { graph, at, position, filter } = place
  if (filter.hidden.has('attention')) return []
  const own = arcsInto(graph, position)
  const byEffect = isByEffect(own, filter)
  const sizeOf = (arc: Arc) => (byEffect ? finite(arc.effect) : arc.share)
  const largest = byEffect ? Math.max(...own.map((arc) => Math.abs(sizeOf(arc))), 1e-9) : 1
  const sink = sinkOf(graph, position)
  const sized = (arcs: readonly Arc[], least: number): SizedArc[] =>
    arcs
      .filter((arc) => arc.source !== arc.position)
      .map((arc) => ({
        ...arc,
        size: Math.min(1, Math.abs(sizeOf(arc)) / largest),
        negative: sizeOf(arc) < 0,
        folded: arc.source === sink,
      }))
      .filter(
        (arc) =>
          arc.size >= least &&
          passes(arc.negative ? -Math.abs(arc.share) : Math.abs(arc.share), filter),
      )
      .sort((a, b) => a.size - b.size)
  const others = at.columns.filter((c) => c.labelled && c.position !== position)
  return [
    ...others.flatMap((column) => sized(arcsInto(graph, column.position), LEAST_ELSEWHERE)),
    ...sized(own, byEffect ? LEAST_EFFECT : LEAST_SHARE),
  ]
}

function isByEffect(arcs: readonly Arc[], { arcs: measure }: Filter): boolean {
  return measure === 'effect' && arcs.every(({ effect }) => effect !== undefined)
}

/**
 * The attention sink: the source to which heads give more than a third of their attention on
 * average. Most of that attention moves nothing, and its arcs would cover the others.
 */
export function sinkOf(graph: FlowGraph, position: number): number | undefined {
  const attention = new Map<number, number>()
  let heads = 0
  for (const layer of graph.layers) {
    for (const { node } of graph.partsOf(`L${layer}/p${position}/ATTENTION_CONCAT`)) {
      heads++
      for (const { node: part, edge } of graph.partsOf(node.id)) {
        if (part.source === undefined || part.source === position) continue
        attention.set(part.source, (attention.get(part.source) ?? 0) + finite(edge.attention))
      }
    }
  }
  const [sink, sum] = [...attention].reduce((a, b) => (b[1] > a[1] ? b : a), [-1, 0])
  return sum > heads / 3 ? sink : undefined
}

const LEAST_READ = 0.03 // of the position that is read most

/** The positions that a position reads, by the sum of its arcs, the most first; without the sink. */
export function readBy(graph: FlowGraph, position: number, filter: Filter): number[] {
  const arcs = arcsInto(graph, position)
  const byEffect = isByEffect(arcs, filter)
  const sink = sinkOf(graph, position)
  const read = new Map<number, number>()
  for (const arc of arcs) {
    if (arc.source === position || arc.source === sink) continue
    const size = Math.abs(byEffect ? finite(arc.effect) : arc.share)
    read.set(arc.source, (read.get(arc.source) ?? 0) + size)
  }
  const sorted = [...read].sort((a, b) => b[1] - a[1])
  const least = LEAST_READ * (sorted[0]?.[1] ?? 0)
  return sorted.filter(([, size]) => size > least).map(([source]) => source)
}

/** What the arcs' widths show, for the legend. */
export function arcLegend({ graph, position, filter }: Omit<Place, 'at'>): string {
  const byEffect = isByEffect(arcsInto(graph, position), filter)
  const measure = byEffect ? `effect on the ${figureName(graph)}` : 'share'
  const sink = sinkOf(graph, position)
  const folded = sink === undefined ? '' : `; short: from ${atPosition(sink, graph.prompt)}`
  return `attention (width: ${measure}${folded})`
}

export function drawArcs(group: Group, arcs: readonly SizedArc[], at: Layout): void {
  group
    .selectAll<SVGPathElement, SizedArc>('path')
    .data(arcs, (arc) => arc.value)
    .join('path')
    .order()
    .attr('data-id', (arc) => arc.value)
    .attr('d', (arc) => arcPath(arc, at))
    .attr('stroke-width', (arc) => 1 + 8 * arc.size)
    .attr('opacity', (arc) => 0.35 + 0.65 * Math.min(1, arc.size * 2.5))
}

const STUB = 22 // px, length of a folded arc

/** A vertical Bézier curve from the top of the residual read to the bottom of the one written. */
function arcPath(arc: SizedArc, at: Layout): string | null {
  const from = at.columns.find((c) => c.position === arc.source)
  const to = at.columns.find((c) => c.position === arc.position)
  const index = at.rows.findIndex((row) => row.layer === arc.layer)
  const [below, above] = [at.rows[index - 1], at.rows[index]]
  if (!from || !to || !below || !above) return null
  const [x1, y1] = [middle(to) - Math.min(14, to.width / 4), above.y + at.cellHeight - 1]
  const start = middle(from) + Math.min(10, from.width / 4)
  const x0 = arc.folded ? Math.max(start, x1 - STUB) : start
  const y0 = arc.folded ? y1 + 6 : below.y + 2
  const turn = (y0 + y1) / 2
  return `M${x0},${y0}C${x0},${turn},${x1},${turn},${x1},${y1}`
}

function middle(column: Column): number {
  return column.x + column.width / 2
}

export function arcClass(arc: SizedArc, position: number, marks: Marks): string {
  const classes = ['arc', arc.negative ? 'subtracts' : 'adds']
  if (arc.position === position) classes.push('into-selected')
  const chosen = (ids: ReadonlySet<string>) => ids.has(arc.value) || ids.has(arc.output)
  if (arc.value === marks.selected || marks.path?.has(arc.value)) classes.push('chosen')
  else if ((marks.path && !marks.path.has(arc.value)) || (marks.found && !chosen(marks.found)))
    classes.push('dim')
  return classes.join(' ')
}
