import type { LayerLevelMessage } from '../contract'
import type { FlowGraph, GraphNode } from '../model/flow_graph'
import type { GradientModel } from '../model/gradient'
import {
  answerAppears,
  type ContributionTree,
  mostAttended,
  type RankedStep,
  rankedSteps,
  topContributor,
} from '../model/graph_queries'
import { isolated, type Token } from '../model/tokens'
import { element, tokenText } from './elements'
import { at, decimals, measure, nodeName, numbered, probability, signed } from './wording'

// The sentences and paths of results, the same as in the client's `_presentation.py`.

/** A node's name as a link. */
interface NodeLink {
  node: GraphNode
  text: string
}

/** Texts, tokens and links in order. */
export type Sentence = readonly (string | Token | NodeLink)[]

/** The sentence as text. */
export function plain(sentence: Sentence): string {
  return sentence
    .map((part) => (typeof part === 'string' ? part : 'node' in part ? part.text : part.label))
    .join('')
}

/** The sentence as elements; links have the node's id in `data-id`. */
export function rendered(sentence: Sentence): (Node | string)[] {
  return sentence.map((part) => {
    if (typeof part === 'string') return part
    if ('label' in part) return tokenText(part.label)
    return element(
      'button',
      { type: 'button', class: 'inline', 'data-id': part.node.id },
      part.text,
    )
  })
}

/** The target, from which step on it ranks first, and the head and neuron that add most. */
export function traceSentences(graph: FlowGraph, position: number): Sentence[] {
  const target = targetSentence(graph, position)
  if (!target) return []
  const sentences = [target, [emergenceSentence(graph, position)]]
  for (const [kind, parts] of [
    ['HEAD_OUTPUT', 'heads'],
    ['MLP_VALUE', 'neurons'],
  ] as const) {
    const best = topContributor(graph, position, kind)
    const among = graph.selectedByContribution ? '' : ` of the selected ${parts}`
    if (best) sentences.push(contributionSentence(graph, best, among))
  }
  return sentences
}

/** The target's rank and probability, and what the model predicts. */
export function targetSentence(graph: FlowGraph, position: number): Sentence | undefined {
  const target = graph.targets.get(position)
  if (!target) return undefined
  const place = ` after ${at(position, graph.prompt)}: `
  const difference = target.logitDifference
  const figure =
    `probability ${probability(target.probability, target.logProbability)}` +
    (difference === undefined
      ? ''
      : `, logit difference ${signed(difference)} to ${graph.other?.label ?? ''}`)
  if (target.rank === 0) return [target.target, `${place}the model’s own prediction, ${figure}.`]
  const ranked = `${place}rank ${target.rank}, ${figure}; the model predicts `
  return [target.target, ranked, target.predicted, '.']
}

/** From which residual step on the target ranks first, or its best rank. */
export function emergenceSentence(graph: FlowGraph, position: number): string {
  const steps = rankedSteps(graph, position)
  const [first] = steps
  if (!first) return 'No residual of this position was traced.'
  const answer = answerAppears(graph, position)
  if (answer) return `Ranked first from ${answer.place} onwards.`
  const best = steps.reduce((a: RankedStep, b) => (b.rank < a.rank ? b : a), first)
  return `Best rank ${best.rank} after ${best.place}; final rank ${steps.at(-1)?.rank}.`
}

/** What contributions add up to: `logit`, or `logit difference`. */
export function figureName(graph: FlowGraph): string {
  return graph.other ? 'logit difference' : 'logit'
}

/** What contributions at a position add up to, with the tokens. */
export function explained(graph: FlowGraph, position: number): string {
  const target = isolated(graph.targets.get(position)?.target.label ?? 'the target')
  return `logit of ${target}${graph.other ? ` minus that of ${isolated(graph.other.label)}` : ''}`
}

function contributionSentence(
  graph: FlowGraph,
  { node, logit }: { node: GraphNode; logit: number },
  among: string,
): Sentence {
  const most = mostAttended(graph, node)
  const reading = most
    ? `, reading ${at(most.position, graph.prompt)} with attention ${decimals(most.attention, 2)}`
    : ''
  const effect = ` adds most${among}: ${signed(logit)} to its ${figureName(graph)}${reading}.`
  return [{ node, text: numbered(node) }, effect]
}

/** The loss, its targets and what the model predicts. */
export function lossSentence({ loss, targets, predicted }: GradientModel): Sentence {
  const of = targets.length > 0 ? [' for ', ...targets] : []
  const prediction = predicted ? ['; the model predicts ', predicted] : []
  return [`Loss ${measure(loss, 4)}`, ...of, ...prediction, '.']
}

/** One line of a contribution tree; a rest has no part. */
export interface ContributionLine {
  depth: number
  name: string
  contribution: number
  part: ContributionTree | undefined
}

/** The lines of a contribution tree; the rest of a node follows its listed parts. */
export function contributionLines(
  tree: ContributionTree,
  graph: FlowGraph,
  depth = 0,
): ContributionLine[] {
  const own = nodeName(tree.node, graph.prompt)
  const name = depth ? own : `${figureName(graph)}, from ${own}`
  const lines = tree.parts.flatMap((part) => contributionLines(part, graph, depth + 1))
  const rest = { depth: depth + 1, name: 'rest', contribution: tree.rest, part: undefined }
  return [
    { depth, name, contribution: tree.contribution, part: tree },
    ...lines,
    ...(lines.length > 0 ? [rest] : []),
  ]
}

/** What is shown of layers without all parts, and why, as `level_sentences` of the client says it. */
export function levelSentences(levels: readonly LayerLevelMessage[]): string[] {
  const layers = new Map<string, LayerLevelMessage[]>()
  for (const level of levels) {
    const shown = shownParts(level)
    layers.set(shown, [...(layers.get(shown) ?? []), level])
  }
  return [...layers].map(([shown, each]) => {
    const numbers = ranges(each.map(({ layer }) => layer ?? 0))
    const named = each.length > 1 ? `layers ${numbers}` : `layer ${numbers}`
    return `${named}: ${shown} only (${each[0]?.reason ?? ''})`
  })
}

/** The sentences of `levelSentences` for a page's summary. */
export function levelNotes(levels: readonly LayerLevelMessage[]): string[] {
  return levelSentences(levels).map((text) => `${text.charAt(0).toUpperCase()}${text.slice(1)}.`)
}

/** `residual stream, mamba (state space), mlp (MLP)`. */
function shownParts({ sublayers }: LayerLevelMessage): string {
  const parts = (sublayers ?? []).map(({ module, kind }) => `${module} (${sublayerName(kind)})`)
  return ['residual stream', ...parts].join(', ')
}

function sublayerName(kind = 'OTHER'): string {
  const name = kind.replace('SUBLAYER_KIND_', '')
  if (name === 'MLP') return name
  return name === 'OTHER' ? 'another mixer' : name.toLowerCase().replace('_', ' ')
}

/** Ascending numbers, three or more consecutive ones as a range: `0 to 3, 5`. */
function ranges(numbers: readonly number[]): string {
  const runs: number[][] = []
  for (const number of numbers) {
    const run = runs.at(-1)
    if (run?.at(-1) === number - 1) run?.push(number)
    else runs.push([number])
  }
  return runs
    .map((run) => (run.length > 2 ? `${run[0]} to ${run.at(-1)}` : run.join(', ')))
    .join(', ')
}
