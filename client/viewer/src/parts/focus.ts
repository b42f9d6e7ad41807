// Keyboard focus inside a picture: one stop for the Tab key, arrows to the nearest neighbour.

export type Direction = 'ArrowLeft' | 'ArrowRight' | 'ArrowUp' | 'ArrowDown'

/** Makes one element of a picture the one that Tab stops at. */
export function rove(picture: Element, current: Element | undefined): void {
  const stops = picture.querySelectorAll<SVGElement>('[tabindex]')
  const chosen = current ?? stops[stops.length - 1]
  for (const stop of stops) {
    const wanted = stop === chosen ? '0' : '-1'
    if (stop.getAttribute('tabindex') !== wanted) stop.setAttribute('tabindex', wanted)
  }
}

/** The nearest focusable element in a direction; straight ahead counts more than aside. */
export function neighbour(
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
