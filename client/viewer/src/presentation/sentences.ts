import type { FlowGraph, GraphNode } from '../model/flow_graph'
import type { GradientModel } from '../model/gradient'
import {
  answerAppears,
  mostAttended,
  type RankedStep,
  rankedSteps,
  type Step,
  topContributor,
} from '../model/graph_queries'
import type { Token } from '../model/tokens'
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
  for (const kind of ['HEAD_OUTPUT', 'MLP_VALUE']) {
    const best = topContributor(graph, position, kind)
    if (best) sentences.push(contributionSentence(graph, best))
  }
  return sentences
}

/** The target's rank and probability, and what the model predicts. */
export function targetSentence(graph: FlowGraph, position: number): Sentence | undefined {
  const target = graph.targets.get(position)
  if (!target) return undefined
  const place = ` after ${at(position, graph.prompt)}: `
  const figure = `probability ${probability(target.probability)}`
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

function contributionSentence(
  graph: FlowGraph,
  { node, logit }: { node: GraphNode; logit: number },
): Sentence {
  const most = mostAttended(graph, node)
  const reading = most
    ? `, reading ${at(most.position, graph.prompt)} with attention ${decimals(most.attention, 2)}`
    : ''
  return [{ node, text: numbered(node) }, ` adds most: ${signed(logit)} to its logit${reading}.`]
}

/** The loss, its targets and what the model predicts. */
export function lossSentence({ loss, targets, predicted }: GradientModel): Sentence {
  const of = targets.length > 0 ? [' for ', ...targets] : []
  const prediction = predicted ? ['; the model predicts ', predicted] : []
  return [`Loss ${measure(loss, 4)}`, ...of, ...prediction, '.']
}

const RESIDUALS = ['RESIDUAL_MID', 'BLOCK_OUTPUT']
const WITHOUT_READING = ['ATTENTION_CONCAT', 'FINAL_NORM']

/** One line of a path: its name, and the step that it ends with. */
export interface PathStep {
  name: string
  step: Step
}

/**
 * The lines of a path back from the prediction. Residuals in a row are one line, because only the
 * residual stream connects them; nodes without a reading of their own are left out.
 */
export function pathSteps(path: readonly Step[], prompt: readonly Token[]): PathStep[] {
  const lines: PathStep[] = []
  let run: Step[] = [] // residuals in a row
  const endRun = () => {
    const [first, last] = [run[0], run.at(-1)]
    if (first && last) lines.push({ name: streamName(first.node, last.node, prompt), step: last })
    run = []
  }
  for (const step of path) {
    const { kind } = step.node
    if (WITHOUT_READING.includes(kind)) continue
    if (RESIDUALS.includes(kind)) {
      run.push(step)
      continue
    }
    endRun()
    lines.push({ name: nodeName(step.node, prompt), step })
  }
  endRun()
  return lines
}

function streamName(first: GraphNode, last: GraphNode, prompt: readonly Token[]): string {
  if (first === last) return nodeName(first, prompt)
  if (first.layer === last.layer) return `L${first.layer}’s residual stream`
  return `residual stream, L${first.layer} to L${last.layer}`
}
