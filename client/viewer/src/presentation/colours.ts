import type { FlowGraph, GraphNode, Scored } from '../model/flow_graph'

// Ranks as colours: bins, not a ramp, since what counts is "first", "among the first ten", ... and
// "pushed to the very end". The colours are `--bin-N` in styles/theme.css.

export const BINS = ['top', '< 10', '< 100', '< 1k', 'middle', 'last 1k', 'last 100'] as const
export const MIDDLE = 4

/**
 * Which bin a rank is in, 0 being the top. A vocabulary of a few thousand has no middle: there a
 * rank belongs to the end that it is nearer to. Without a vocabulary's size there is no far end.
 */
export function rankBin(rank: number | undefined, vocabulary: number | undefined): number {
  if (rank === undefined) return MIDDLE
  const fromEnd = vocabulary ? vocabulary - 1 - rank : Number.POSITIVE_INFINITY
  if (fromEnd < rank) return fromEnd < 100 ? 6 : fromEnd < 1000 ? 5 : MIDDLE
  return rank === 0 ? 0 : rank < 10 ? 1 : rank < 100 ? 2 : rank < 1000 ? 3 : MIDDLE
}

// Norms as colours: cream to plum on a square-root scale, so that what is small is not all the same.
// On dark paper the scale is turned over: in both the large stand out from the paper. The browser
// takes the colour of its scheme, so that a change of theme, or paper, draws nothing anew.

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

/** Colours in CSS, each one for light paper and one for dark. */
export interface Paint {
  fill: string
  ink: string
}

/** The colour of a norm among others up to `largest`, and the ink that is readable on it. */
export function normPaint(norm: number, largest: number): Paint {
  const part = largest > 0 ? Math.sqrt(Math.min(1, Math.max(0, norm / largest))) : 0
  const [light, dark] = [between(LIGHT, part), between(DARK, part)]
  return {
    fill: `light-dark(rgb(${light.join(' ')}), rgb(${dark.join(' ')}))`,
    ink: `light-dark(${inkOn(light)}, ${inkOn(dark)})`,
  }
}

/** A few steps of the scale, for its legend. */
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

/** Black or white, whichever has more contrast (WCAG 2.2, relative luminance). */
function inkOn(colour: Rgb): string {
  const [red, green, blue] = colour.map((part) => {
    const value = part / 255
    return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4
  })
  const luminance = 0.2126 * (red ?? 0) + 0.7152 * (green ?? 0) + 0.0722 * (blue ?? 0)
  return (luminance + 0.05) ** 2 > 1.05 * 0.05 ? '#000' : '#fff'
}

// What a node looks like besides its text: shared by the overview, the details and the inspector.

/** What marks nodes: the selection, pins, a search, a followed path. */
export interface Marks {
  /** Equal for equal marks. */
  key: string
  selected: string
  pinned: ReadonlySet<string>
  /** Ids that a search found; undefined without a search. */
  found: ReadonlySet<string> | undefined
  /** Ids of the followed path; undefined when none is followed. */
  path: ReadonlySet<string> | undefined
}

/** Classes of a chip or cell; `dim` is what a search or a path leaves out. */
export function chipClass(
  node: GraphNode | undefined,
  graph: FlowGraph,
  marks: Marks,
  flipped = false,
): string {
  return node ? `chip bin-${binOf(node, graph, flipped)}${markClass(node, marks)}` : 'chip empty'
}

/** What marks a node, as classes behind others. */
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

/** The bin of the target's rank; a row that is read from its bottom is binned from there too. */
export function binOf(node: GraphNode, graph: FlowGraph, flipped = false): number {
  const rank = node.reading?.targetRank
  if (flipped && rank !== undefined && graph.vocabulary) {
    return rankBin(graph.vocabulary - 1 - rank, graph.vocabulary)
  }
  return rankBin(rank, graph.vocabulary)
}

/** The token that a node is shown as: its top one, or the bottom one where that is what it writes. */
export function shownToken(node: GraphNode, flipped = false): Scored | undefined {
  return flipped ? node.reading?.bottom[0] : node.reading?.top[0]
}

/** Whether a node is written with a negative factor. */
export function isFlipped(node: GraphNode): boolean {
  return (node.activation ?? 0) < 0
}
