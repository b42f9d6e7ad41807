// Where a layer's parts stand: the rail on top, attention's columns left, the MLP's right of them, or
// below where there is no room.
import type { FlowGraph } from '../../graph/graph'
import type { Filter } from '../filter'
import { placeAttention } from './attention'
import { mlpHeight, placeMlp } from './mlp'
import type { LayerModel } from './model'
import { Detail } from './placing'
import { placeRail } from './rail'

const RAIL = 68
const GAP = 16
const WIDE = 900 // room for both blocks side by side

export function detailLayout(
  model: LayerModel,
  graph: FlowGraph,
  filter: Filter,
  width: number,
): Detail {
  const detail = new Detail(width)
  const both = !filter.hidden.has('attention') && !filter.hidden.has('mlp')
  const beside = both && width >= WIDE
  const left = beside ? Math.round((width - GAP) * 0.6) : width
  const bar = beside ? mlpHeight(model, filter) : 0
  const attention = filter.hidden.has('attention')
    ? undefined
    : placeAttention(detail, model, graph, filter, { x: 0, y: RAIL, width: left, bar })
  const y = beside || !attention ? RAIL : attention.bottom + GAP
  const place = { x: beside ? left + GAP : 0, y, width: beside ? width - GAP - left : width, bar }
  const mlp = filter.hidden.has('mlp') ? undefined : placeMlp(detail, model, graph, filter, place)
  placeRail(detail, model, attention?.joint, beside || !attention ? mlp?.joint : undefined)
  const bottom = Math.max(RAIL, attention?.bottom ?? 0, mlp?.bottom ?? 0)
  if (beside) for (const panel of detail.panels) panel.height = bottom - panel.y
  detail.height = bottom + 2
  return detail
}
