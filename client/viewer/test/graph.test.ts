import assert from 'node:assert/strict'
import { test } from 'node:test'
import { FlowGraph } from '../src/model/flow_graph'
import {
  answerAppears,
  contributionTree,
  mostAttended,
  search,
  selectionFlow,
  strongestDestination,
  topContributor,
} from '../src/model/graph_queries'
import { arcLegend, arcsInto, arcsOf, sinkOf } from '../src/trace/arcs'
import { type Filter, passing } from '../src/trace/controls'
import { layerModel } from '../src/trace/layer_model'
import { layout } from '../src/trace/overview_layout'
import { stream } from './stream'

const EVERYTHING: Filter = {
  key: '',
  minimum: 0,
  sign: '',
  hidden: new Set(),
  opened: new Set(),
  arcs: 'effect',
}

function graph(): FlowGraph {
  const made = new FlowGraph()
  for (const message of stream()) made.feed(message)
  return made
}

test('feeding a stream twice does not duplicate nodes', () => {
  const once = graph()
  for (const message of stream()) once.feed(message)
  assert.equal(once.partsOf('L0/p1/ATTENTION_CONCAT').length, 2)
  assert.ok(once.complete)
})

test('a graph is complete when all its streams are', () => {
  const [header, layer, summary] = stream()
  const made = new FlowGraph()
  assert.ok(header && layer && summary)
  made.feed(header)
  for (const message of stream()) made.feed(message)
  assert.ok(!made.complete)
  made.feed(summary)
  assert.ok(made.complete)
})

test('parts are sorted by share', () => {
  const parts = graph().partsOf('L0/p1/ATTENTION_CONCAT')
  assert.deepEqual(
    parts.map(({ node }) => node.head),
    [3, 0],
  )
})

test('token texts come from the first message that names them', () => {
  const top = graph().node('L0/p1/RESIDUAL_MID')?.reading?.top[0]
  assert.equal(top?.token.label, '␣Tokyo')
})

test('the answer appears where its rank becomes and stays 0', () => {
  const answer = answerAppears(graph(), 1)
  assert.equal(answer?.node.id, 'L0/p1/RESIDUAL_MID')
  assert.equal(answer?.place, 'layer 0’s attention')
})

test('the contribution tree lists the largest contributions with what contains them', () => {
  const tree = contributionTree(graph(), 1, 4)
  assert.deepEqual(
    tree?.parts.map(({ node }) => node.id),
    ['L0/p1/ATTENTION_OUTPUT'],
  )
  const heads = tree?.parts[0]?.parts ?? []
  assert.deepEqual(
    heads.map(({ node, contribution, parts }) => [node.head, contribution, parts.length]),
    [
      [3, 2.75, 1],
      [0, 0.5, 0],
    ],
  )
})

test('the selection flow multiplies shares', () => {
  const flow = selectionFlow(graph(), 'L0/p1/MEMORY_KEY/h3/s0')
  assert.equal(flow.get('L0/p1/MEMORY_VALUE/h3/s0'), 1)
  assert.equal(flow.get('L0/p1/HEAD_OUTPUT/h3'), 0.9)
  assert.equal(flow.get('L0/p1/HEAD_OUTPUT/h0'), undefined)
  assert.equal(strongestDestination(graph(), 'L0/p1/MLP_OUTPUT')?.id, 'L0/p1/BLOCK_OUTPUT')
})

test('the share of an arc is a product of shares', () => {
  const [arc, ...others] = arcsInto(graph(), 1)
  assert.equal(others.length, 0)
  assert.equal(arc?.source, 0)
  assert.equal(arc?.head, 3)
  assert.ok(Math.abs((arc?.share ?? 0) - 0.63) < 1e-9)
})

test('arcs are as wide as their effect or share, and a filter hides them', () => {
  const made = graph()
  const at = layout(2, [0], 1, 1100)
  const place = { graph: made, at, position: 1, filter: EVERYTHING }
  assert.deepEqual(
    arcsOf(place).map(({ value, size }) => [value, size]),
    [['L0/p1/MEMORY_VALUE/h3/s0', 1]],
  )
  const byShare = arcsOf({ ...place, filter: { ...EVERYTHING, arcs: 'share' } })
  assert.ok(Math.abs((byShare[0]?.size ?? 0) - 0.63) < 1e-9)
  for (const hiding of [
    { hidden: new Set(['attention']) },
    { sign: '-' as const },
    { minimum: 0.7 },
  ]) {
    assert.equal(arcsOf({ ...place, filter: { ...EVERYTHING, ...hiding } }).length, 0)
  }
})

test('arcs from the attention sink are folded and named in the legend', () => {
  const made = graph()
  assert.equal(sinkOf(made, 1), 0)
  const at = layout(2, [0], 1, 1100)
  const place = { graph: made, at, position: 1, filter: { ...EVERYTHING, arcs: 'share' as const } }
  assert.ok(arcsOf(place).every(({ folded }) => folded))
  assert.equal(arcLegend(place), 'attention (width: share; short: from The (0))')
})

test('the top contributor names its source even if the remainder has more attention', () => {
  const made = graph()
  const rest = 'L0/p1/OTHER/h3'
  made.feed({
    layer: {
      nodes: [{ id: rest, kind: 'NODE_KIND_OTHER', layer: 0, position: 1, head: 3 }],
      edges: [
        { source: rest, target: 'L0/p1/HEAD_OUTPUT/h3', kind: 'EDGE_KIND_PART', attention: 0.95 },
      ],
    },
  })
  const best = topContributor(made, 1, 'HEAD_OUTPUT')
  assert.equal(best?.node.head, 3)
  assert.equal(best?.logit, 2.75)
  assert.deepEqual(best && mostAttended(made, best.node), { position: 0, attention: 0.8 })
})

test('the embedding belongs to the first layer and the prediction to the last', () => {
  const made = graph()
  made.layers.add(4)
  const embedding = made.node('p1/BLOCK_INPUT')
  assert.ok(embedding)
  assert.equal(made.layerOf(embedding), 0)
  assert.equal(made.layerOf({ ...embedding, kind: 'PREDICTION' }), 4)
  assert.equal(made.layerOf({ ...embedding, layer: 3 }), 3)
})

test('search accepts a part of a token, a whole token or an id', () => {
  const found = (query: string) => search(graph(), query).map(({ node }) => node.id)
  assert.equal(found('okyo').length, 5)
  assert.deepEqual(found('#3'), ['L0/p1/MEMORY_KEY/h3/s0'])
  assert.deepEqual(found(' kyo'), [])
  assert.deepEqual(found('  '), [])
})

test('filters report the share that they keep', () => {
  const rows = layerModel(graph(), 0, 1).mlp?.rows ?? []
  assert.equal(passing(rows, EVERYTHING).kept, 1)
  const adding = passing(rows, { ...EVERYTHING, sign: '+' })
  assert.deepEqual([adding.shown.length, adding.hidden], [1, 1])
  assert.ok(Math.abs(adding.kept - 1.2 / 1.4) < 1e-9)
})
