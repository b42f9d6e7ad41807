import { finite } from '../contract'
import type { FlowGraph, GraphNode, Scored } from '../model/flow_graph'

// Colours of ranks, norms and nodes.
//
// Ranks have seven bins rather than a continuous scale: first, first ten, ..., last hundred. Their
// colours are `--bin-N` in styles/theme.css.

export const BINS = ['top', '< 10', '< 100', '< 1k', 'middle', 'last 1k', 'last 100'] as const
export const MIDDLE = 4

/**
 * The bin of a rank; rank 0 is the top. In a vocabulary of at most 2,000 tokens there is no middle
 * bin: a rank belongs to the nearer end. If the vocabulary's size is unknown, there is no far end.
 */
export function rankBin(rank: number | undefined, vocabulary: number | undefined): number {
  if (rank === undefined) return MIDDLE
  const fromEnd = vocabulary ? vocabulary - 1 - rank : Number.POSITIVE_INFINITY
  if (fromEnd < rank) return fromEnd < 100 ? 6 : fromEnd < 1000 ? 5 : MIDDLE
  return rank === 0 ? 0 : rank < 10 ? 1 : rank < 100 ? 2 : rank < 1000 ? 3 : MIDDLE
}

// Norms have a continuous square-root scale, which separates small values. The dark theme uses the
// reverse scale, so that large norms contrast with the background in both. Both colours are written
// as `light-dark(...)`, so that a theme change needs no redraw.

type Rgb = readonly [number, number, number]

const LIGHT: readonly Rgb[] = [
  [245, 236, 222],
  [244, 199, 160],
  [231, 147, 124],
  [181, 83, 120],
  [94, 42, 104],
]
const DARK: readonly Rgb[] = [
  [38, 35, 46],
  [78, 48, 84],
  [142, 66, 116],
  [216, 122, 118],
  [248, 220, 192],
]

/** CSS colours, each for the light and the dark theme. */
export interface Paint {
  fill: string
  ink: string
}

/** The colour of a norm on a scale from 0 to `largest`, and a text colour that is readable on it. */
export function normPaint(norm: number, largest: number): Paint {
  const part = largest > 0 ? Math.sqrt(Math.min(1, Math.max(0, finite(norm) / largest))) : 0
  const [light, dark] = [between(LIGHT, part), between(DARK, part)]
  return {
    fill: `light-dark(rgb(${light.join(' ')}), rgb(${dark.join(' ')}))`,
    ink: `light-dark(${inkOn(light)}, ${inkOn(dark)})`,
  }
}

/** Evenly spaced colours of the scale, for its legend. */
export function normSteps(count: number): string[] {
  return Array.from({ length: count }, (_, i) => normPaint(i, count - 1).fill)
}

function between(stops: readonly Rgb[], part: number): Rgb {
  const place = part * (stops.length - 1)
  const below = Math.min(Math.floor(place), stops.length - 2)
  const [low, high] = [stops[below] ?? stops[0], stops[below + 1] ?? stops[0]]
  const mix = (i: 0 | 1 | 2) => {
    const [a, b] = [low?.[i] ?? 0, high?.[i] ?? 0]
    return Math.round(a + (b - a) * (place - below))
  }
  return [mix(0), mix(1), mix(2)]
}

/** Black or white, whichever has the higher contrast (WCAG 2.2, relative luminance). */
function inkOn(colour: Rgb): string {
  const [red, green, blue] = colour.map((part) => {
    const value = part / 255
    return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4
  })
  const luminance = 0.2126 * (red ?? 0) + 0.7152 * (green ?? 0) + 0.0722 * (blue ?? 0)
  return (luminance + 0.05) ** 2 > 1.05 * 0.05 ? '#000' : '#fff'
}

// How a node is shown: its token, its colour and its CSS classes.

/** The nodes to highlight: selected, pinned, found by a search, or on the path. */
export interface Marks {
  /** Changes whenever the marks change. */
  key: string
  selected: string
  pinned: ReadonlySet<string>
  /** Ids found by a search; undefined if there is no search. */
  found: ReadonlySet<string> | undefined
  /** Ids on the path; undefined if the path is not shown. */
  path: ReadonlySet<string> | undefined
}

/** Classes of a chip or cell; nodes outside the search or the path are `dim`. */
export function chipClass(
  node: GraphNode | undefined,
  graph: FlowGraph,
  marks: Marks,
  flipped = false,
): string {
  return node ? `chip bin-${binOf(node, graph, flipped)}${markClass(node, marks)}` : 'chip empty'
}

/** The classes of a node's marks, with a leading space. */
export function markClass(node: GraphNode, marks: Marks): string {
  const classes = ['']
  if (node.id === marks.selected) classes.push('selected')
  if (marks.pinned.has(node.id)) classes.push('pinned')
  if (marks.found?.has(node.id)) classes.push('found')
  if (marks.path?.has(node.id)) classes.push('on-path')
  const left =
    (marks.found && !marks.found.has(node.id)) || (marks.path && !marks.path.has(node.id))
  if (left) classes.push('dim')
  return classes.join(' ')
}

/** The bin of the target's rank; for a flipped node, of its rank from the bottom. */
export function binOf(node: GraphNode, graph: FlowGraph, flipped = false): number {
  const rank = node.reading?.targetRank
  if (flipped && rank !== undefined && graph.vocabulary) {
    return rankBin(graph.vocabulary - 1 - rank, graph.vocabulary)
  }
  return rankBin(rank, graph.vocabulary)
}

/** The token shown for a node: its top token, or its bottom token if it is flipped. */
export function shownToken(node: GraphNode, flipped = false): Scored | undefined {
  return flipped ? node.reading?.bottom[0] : node.reading?.top[0]
}

/** Whether a node has a negative factor, so that it promotes its bottom tokens. */
export function isFlipped(node: GraphNode): boolean {
  return (node.activation ?? 0) < 0
}
