import type { Selection } from 'd3-selection'

export type Svg = Selection<SVGSVGElement, unknown, null, undefined>
export type Group = Selection<SVGGElement, unknown, null, undefined>

/** Width of a character in the pictures' font, 11.5 px monospaced. */
export const CHARACTER = 6.95

/** The group with this name, appended on first use; later groups are drawn above earlier ones. */
export function groupNamed(svg: Svg, name: string): Group {
  const found = svg.select<SVGGElement>(`g.${name}`)
  return found.empty() ? svg.append('g').attr('class', name) : found
}

/** Number of characters that fit into a width. */
export function charactersIn(width: number): number {
  return Math.max(1, Math.floor(width / CHARACTER))
}

/** Hatch patterns that distinguish remainders, subtractions and what was not read without colour. */
export function defineHatches(svg: Svg): void {
  if (!svg.select('defs').empty()) return
  const defs = svg.append('defs')
  for (const [name, angle] of [
    ['hatch-rest', 45],
    ['hatch-minus', -45],
    ['hatch-unread', 45],
  ] as const) {
    const pattern = defs.append('pattern').attr('id', name).attr('patternUnits', 'userSpaceOnUse')
    pattern.attr('width', 5).attr('height', 5).attr('patternTransform', `rotate(${angle})`)
    pattern.append('rect').attr('width', 5).attr('height', 5)
    pattern.append('path').attr('d', 'M0,0V5')
  }
}

/** Sets the class of each element from its datum; unchanged elements are not touched. */
export function setClasses<Datum>(svg: Svg, chosen: string, of: (datum: Datum) => string): void {
  svg.selectAll<SVGElement, Datum>(chosen).each(function (datum) {
    const wanted = of(datum)
    if (this.getAttribute('class') !== wanted) this.setAttribute('class', wanted)
  })
}

const drawn = new WeakMap<Element, string>()

/** Whether `key` differs from the element's last key; skipping equal ones avoids layout work. */
export function needsRedraw(element: Element, key: string): boolean {
  if (drawn.get(element) === key) return false
  drawn.set(element, key)
  return true
}

// Keyboard navigation in a picture: one Tab stop, arrow keys to the nearest element.

export type Direction = 'ArrowLeft' | 'ArrowRight' | 'ArrowUp' | 'ArrowDown'

/** Makes one element of a picture its only Tab stop: the focused one, `current`, or the last. */
export function setTabStop(picture: Element, current: Element | undefined): void {
  const stops = picture.querySelectorAll<SVGElement>('[tabindex]')
  const focused = [...stops].find((stop) => stop === document.activeElement)
  const chosen = focused ?? current ?? stops[stops.length - 1]
  for (const stop of stops) {
    const wanted = stop === chosen ? '0' : '-1'
    if (stop.getAttribute('tabindex') !== wanted) stop.setAttribute('tabindex', wanted)
  }
}

/** The nearest focusable element in a direction; sideways distance weighs four times as much. */
export function nearestInDirection(
  picture: Element,
  from: Element,
  direction: Direction,
): SVGElement | undefined {
  const here = centre(from)
  let best: SVGElement | undefined
  let least = Number.POSITIVE_INFINITY
  for (const stop of picture.querySelectorAll<SVGElement>('[tabindex]')) {
    const there = centre(stop)
    const cost = distance(there.x - here.x, there.y - here.y, direction)
    if (stop !== from && cost < least) {
      best = stop
      least = cost
    }
  }
  return best
}

function centre(element: Element): { x: number; y: number } {
  const box = element.getBoundingClientRect()
  return { x: box.left + box.width / 2, y: box.top + box.height / 2 }
}

function distance(dx: number, dy: number, direction: Direction): number {
  const horizontal = direction === 'ArrowLeft' || direction === 'ArrowRight'
  const sign = direction === 'ArrowLeft' || direction === 'ArrowUp' ? -1 : 1
  const ahead = sign * (horizontal ? dx : dy)
  const aside = Math.abs(horizontal ? dy : dx)
  return ahead < 3 ? Number.POSITIVE_INFINITY : ahead + 4 * aside
}

export interface Column {
  position: number
  x: number
  width: number
  /** Wide enough for a token's text. */
  labelled: boolean
}

export const GUTTER = 46

const GAP = 10

export const NARROWEST_LABEL = 58

const WIDEST = 116

const LENS = 10

/**
 * One column per position. If labels do not fit, only some columns have them: the selected one, the
 * positions that it reads most (`read`, the most first), and its neighbours.
 */
export function columnsIn(
  positions: number,
  selected: number,
  left: number,
  room: number,
  read: readonly number[] = [],
): Column[] {
  const even = Math.min(WIDEST, room / positions)
  if (even >= NARROWEST_LABEL || positions <= 3) {
    return Array.from({ length: positions }, (_, position) => ({
      position,
      x: left + position * even,
      width: even - GAP,
      labelled: true,
    }))
  }
  const shown = Math.max(3, Math.min(LENS, Math.floor((room * 0.8) / NARROWEST_LABEL)))
  return lens(positions, selected, left, room, labelledIn(positions, selected, shown, read))
}

const NEIGHBOURS = 4 // labelled columns, the selected one among them, if half of all are left for others

function labelledIn(
  positions: number,
  selected: number,
  shown: number,
  read: readonly number[],
): ReadonlySet<number> {
  const remote = Math.max(shown - NEIGHBOURS, Math.ceil(shown / 2))
  const labelled = new Set([selected, ...read.slice(0, remote)])
  const first = Math.max(0, Math.min(positions - shown, selected - Math.floor(shown * 0.7)))
  const around = Array.from({ length: shown }, (_, i) => first + i)
  around.sort((a, b) => Math.abs(a - selected) - Math.abs(b - selected))
  for (const position of around) if (labelled.size < shown) labelled.add(position)
  return labelled
}

const TIGHT = 300 // px; less room is for the labels
const SELECTED = 1.6 // width of the selected column relative to other labelled ones
const SELECTED_IF_TIGHT = 1.4

/** Labelled columns, of which the selected one is wider; the rest are narrow, as a heat map. */
function lens(
  positions: number,
  selected: number,
  left: number,
  room: number,
  labelled: ReadonlySet<number>,
): Column[] {
  const shown = labelled.size
  const starts = (position: number) =>
    position > 0 && labelled.has(position) !== labelled.has(position - 1)
  const all = Array.from({ length: positions }, (_, position) => position)
  const groups = all.filter(starts).length
  const apart = Math.min(GAP, (room * 0.1) / Math.max(1, groups))
  const gaps = apart * groups
  const tight = room < TIGHT
  const ratio = tight ? SELECTED_IF_TIGHT : SELECTED
  const others = Math.min(room * (tight ? 0.16 : 0.24), (positions - shown) * 10)
  const wide = Math.min(84, (room - others - gaps) / (shown + ratio - 1))
  const taken = wide * (shown + ratio - 1) + gaps
  const narrow = Math.min(20, (room - taken) / (positions - shown))
  let x = left
  return all.map((position) => {
    if (starts(position)) x += apart
    const wanted = labelled.has(position)
    const pitch = position === selected ? wide * ratio : wanted ? wide : narrow
    const gap = wanted ? Math.min(GAP, 6) : Math.min(2, narrow * 0.2)
    x += pitch
    return { position, x: x - pitch, width: pitch - gap, labelled: wanted }
  })
}
