import type { GraphNode } from '../../graph/nodes'
import { percent } from '../../parts/numbers'
import type { LayerModel } from './model'
import { CHIP, type Detail, type Placed, ROW } from './placing'

const WIDTH = 104 // of a stop's chip

interface Stop {
  node: GraphNode
  x: number
  label: string
  /** Share of what came before in what is here. */
  kept: number | undefined
}

/** The residual stream above the blocks, and what each block adds to it. */
export function placeRail(
  detail: Detail,
  model: LayerModel,
  attention: Placed['joint'],
  mlp: Placed['joint'],
): void {
  const stops = stopsOf(detail.width, model, attention)
  stops.forEach((stop, i) => {
    placeStop(detail, stop, i === 0, i === stops.length - 1)
    const previous = stops[i - 1]
    if (!previous) return
    const label = stop.kept === undefined ? '' : `${percent(stop.kept)} from before`
    const segment = {
      node: previous.node,
      x0: previous.x + WIDTH,
      x1: stop.x,
      share: stop.kept,
      label,
    }
    detail.rail.segments.push(segment)
  })
  const mid = stops.find(({ node }) => node === model.mid)
  join(detail, attention, model.attention.outputShare, mid && mid.x + WIDTH / 2)
  join(detail, mlp, model.mlp.outputShare)
}

function stopsOf(width: number, model: LayerModel, attention: Placed['joint']): Stop[] {
  const end = width - WIDTH
  const stops: Stop[] = []
  if (model.before) stops.push({ node: model.before, x: 0, label: 'before', kept: undefined })
  if (model.mid) {
    const under = attention ? attention.x - WIDTH / 2 : end
    const x = under < end - WIDTH - 40 ? under : (end - WIDTH) / 2
    stops.push({ node: model.mid, x, label: 'after attention', kept: model.keptByMid })
  }
  if (model.after) {
    const label = model.mid ? 'after the MLP' : 'after the block'
    stops.push({ node: model.after, x: end, label, kept: model.keptByAfter })
  }
  return stops
}

function placeStop(detail: Detail, stop: Stop, first: boolean, last: boolean): void {
  const { y } = detail.rail
  detail.chip(stop.node, stop.x, y, WIDTH)
  const [x, anchor] = first
    ? ([stop.x, 'start'] as const)
    : last
      ? ([stop.x + WIDTH, 'end'] as const)
      : ([stop.x + WIDTH / 2, 'middle'] as const)
  detail.text(x, y - 7, stop.label, 'column', anchor)
}

/** From an output up to the rail: to its stop where one stands elsewhere, else straight. */
function join(
  detail: Detail,
  joint: Placed['joint'],
  share: number | undefined,
  stop?: number | undefined,
): void {
  if (!joint) return
  const label = share === undefined ? '' : `${share < 0 ? '' : '+'}${percent(share)}`
  const y1 = detail.rail.y + (ROW + CHIP) / 2
  const to = stop ?? joint.x
  detail.rail.joints.push({ node: joint.node, x: joint.x, to, y0: joint.y, y1, share, label })
}
