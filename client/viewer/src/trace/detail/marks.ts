// What a selection, a search or a path changes in a layer's picture: classes, and the coloured part
// of the ribbons that a selection makes up.
import type { FlowGraph } from '../../graph/graph'
import { chipClass, type Marks } from '../../parts/look'
import { classify, type Svg, stratum } from '../../parts/svg'
import type { Followed } from '../follow'
import { jointPath, kindOf, railMiddle, thickness } from './draw'
import type { Chip, Detail, Rail, Ribbon } from './placing'
import { band } from './ribbons'

export function markDetail(
  svg: Svg,
  detail: Detail,
  graph: FlowGraph,
  marks: Marks,
  way: Followed,
): void {
  classify<Chip>(svg, '.chips > g', (chip) => {
    const look = chipClass(chip.node, graph, marks, chip.flipped)
    return chip.words ? `${look} rest` : look
  })
  classify<Ribbon>(svg, '.ribbons > path', (ribbon) => ribbonClass(ribbon, marks))
  const followed = detail.ribbons.filter(({ node }) => way.has(node.id))
  stratum(svg, 'ways')
    .selectAll('path')
    .data(followed)
    .join('path')
    .attr('class', 'followed')
    .attr('d', (ribbon) => band(ribbon, 0, way.get(ribbon.node.id)))
  markRail(svg, detail.rail, way)
}

/** What the selection is of the residual, and of what joins it. */
function markRail(svg: Svg, rail: Rail, way: Followed): void {
  const middle = railMiddle(rail)
  const wide = (part: { node: { id: string }; share: number | undefined }) =>
    thickness(part.share) * (way.get(part.node.id) ?? 0)
  const pieces = [
    ...rail.segments.map((s) => ({
      id: s.node.id,
      d: `M${s.x0},${middle}H${s.x1}`,
      wide: wide(s),
    })),
    ...rail.joints.map((j) => ({ id: j.node.id, d: jointPath(j), wide: wide(j) })),
  ]
  stratum(svg, 'rail-ways')
    .selectAll('path')
    .data(pieces.filter((piece) => piece.wide > 0))
    .join('path')
    .attr('data-way', (piece) => piece.id)
    .attr('d', (piece) => piece.d)
    .attr('stroke-width', (piece) => piece.wide)
}

function ribbonClass(ribbon: Ribbon, marks: Marks): string {
  const classes = ['ribbon', kindOf(ribbon)]
  const { id } = ribbon.node
  if ((marks.path && !marks.path.has(id)) || (marks.found && !marks.found.has(id))) {
    classes.push('dim')
  }
  return classes.join(' ')
}
