// What a layer's picture is made of, and how its smallest pieces are put in place.
import type { GraphNode } from '../../graph/nodes'

export interface Box {
  x: number
  y: number
  width: number
  height: number
}

/** A node drawn as its top token. */
export interface Chip extends Box {
  node: GraphNode
  /** Read from the bottom: written with a negative factor. */
  flipped: boolean
  /** A remainder: hatched, with these words in place of a token. */
  words: string | undefined
}

/** A part's way from its row into the sum's bar, or into its head. */
export interface Ribbon {
  node: GraphNode
  share: number
  x0: number
  y0: number
  h0: number
  x1: number
  y1: number
  h1: number
}

export interface Text {
  x: number
  y: number
  text: string
  style: 'title' | 'column' | 'number' | 'strong' | 'quiet' | 'source'
  anchor: 'start' | 'middle' | 'end'
  /** Cut to this width. */
  width?: number
}

/** A bar whose length is a quantity of its own: attention (0 to 1) or an activation. */
export interface Bar extends Box {
  kind: 'attention' | 'adds' | 'subtracts' | 'track' | 'strip'
}

/** What opens or closes a head. */
export interface Toggle extends Box {
  /** `layer.head`. */
  head: string
  open: boolean
  words: string
}

/** The residual stream along the top: before, after attention, after the MLP. */
export interface Rail {
  y: number
  segments: { node: GraphNode; x0: number; x1: number; share: number | undefined; label: string }[]
  /** From an output's chip up to the rail. */
  joints: {
    node: GraphNode
    x: number
    /** Where it meets the rail. */
    to: number
    y0: number
    y1: number
    share: number | undefined
    label: string
  }[]
}

export const ROW = 23
export const CHIP = 19
export const PAD = 14
/** Height of a panel's title and its columns' names. */
export const HEAD = 66
export const BAR = 12

/** A picture of one layer as it is being put together. */
export class Detail {
  height = 0
  readonly panels: Box[] = []
  readonly groups: Box[] = []
  readonly chips: Chip[] = []
  readonly ribbons: Ribbon[] = []
  readonly bars: Bar[] = []
  readonly texts: Text[] = []
  readonly toggles: Toggle[] = []
  /** The sums' bars, as outlines. */
  readonly sums: Box[] = []
  readonly rail: Rail = { y: 18, segments: [], joints: [] }

  constructor(readonly width: number) {}

  chip(node: GraphNode, x: number, y: number, width: number, flipped = false): void {
    this.chips.push({ ...chipBox(x, y, width), node, flipped, words: undefined })
  }

  /** A remainder: what it stands for in words. */
  rest(node: GraphNode, words: string, x: number, y: number, width: number): void {
    this.chips.push({ ...chipBox(x, y, width), node, flipped: false, words })
  }

  text(
    x: number,
    y: number,
    words: string,
    style: Text['style'],
    anchor: Text['anchor'] = 'start',
    width?: number,
  ): void {
    this.texts.push({ x, y, text: words, style, anchor, ...(width === undefined ? {} : { width }) })
  }

  bar(kind: Bar['kind'], x: number, y: number, width: number, height: number): void {
    this.bars.push({ kind, x, y, width, height })
  }
}

function chipBox(x: number, y: number, width: number): Box {
  return { x, y: y + (ROW - CHIP) / 2, width, height: CHIP }
}

/** A bar to the right of its middle for what adds, to the left for what subtracts; -1 to 1. */
export function scaled(detail: Detail, value: number, x: number, y: number, width: number): void {
  const zero = x + width / 2
  const length = Math.max(0.5, Math.abs(value) * (width / 2))
  detail.bar('track', zero, y + 3, 1, ROW - 6)
  const start = value < 0 ? zero - length : zero
  detail.bar(value < 0 ? 'subtracts' : 'adds', start, y + 7, length, ROW - 14)
}

/** Where a block is to be placed. */
export interface Place {
  x: number
  y: number
  width: number
  /** Height that its sum's bar shall at least have. */
  bar: number
}

/** Where a block ended, and where the rail is joined to it. */
export interface Placed {
  bottom: number
  joint: { node: GraphNode; x: number; y: number } | undefined
}
