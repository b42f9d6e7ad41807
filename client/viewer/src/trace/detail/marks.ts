// What a selection, a search or a path changes in a layer's picture: classes, and the coloured part
// of the ribbons that a selection makes up.
import type { FlowGraph } from '../../graph/graph'
import { chipClass, type Marks } from '../../parts/look'
import { classify, type Svg, stratum } from '../../parts/svg'
import { kindOf } from './draw'
import type { Chip, Detail, Ribbon } from './placing'
import { band } from './ribbons'

/** `fraction` says how much of a node's ribbon the selection makes up, 0 to 1. */
export function markDetail(
  svg: Svg,
  detail: Detail,
  graph: FlowGraph,
  marks: Marks,
  fraction: (nodeId: string) => number,
): void {
  classify<Chip>(svg, '.chips > g', (chip) => {
    const look = chipClass(chip.node, graph, marks, chip.flipped)
    return chip.words ? `${look} rest` : look
  })
  classify<Ribbon>(svg, '.ribbons > path', (ribbon) => ribbonClass(ribbon, marks))
  const followed = detail.ribbons
    .map((ribbon) => ({ ribbon, part: fraction(ribbon.node.id) }))
    .filter(({ part }) => part > 0)
  stratum(svg, 'ways')
    .selectAll('path')
    .data(followed)
    .join('path')
    .attr('class', 'followed')
    .attr('d', ({ ribbon, part }) => band(ribbon, 0, Math.min(1, part)))
}

function ribbonClass(ribbon: Ribbon, marks: Marks): string {
  const classes = ['ribbon', kindOf(ribbon)]
  const { id } = ribbon.node
  if ((marks.path && !marks.path.has(id)) || (marks.found && !marks.found.has(id))) {
    classes.push('dim')
  }
  return classes.join(' ')
}
