// Bundles the unit tests and runs them with Node's own runner.
import { spawnSync } from 'node:child_process'
import { mkdtempSync, readdirSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { build } from 'esbuild'

const here = dirname(fileURLToPath(import.meta.url))
const out = mkdtempSync(join(tmpdir(), 'viewer-tests-'))
const tests = readdirSync(join(here, 'test')).filter((name) => name.endsWith('.test.ts'))
await build({
  absWorkingDir: here,
  entryPoints: tests.map((name) => join('test', name)),
  outdir: out,
  outExtension: { '.js': '.mjs' },
  bundle: true,
  platform: 'node',
  format: 'esm',
  target: 'node20',
  loader: { '.css': 'text', '.jsonl': 'text' },
})
const files = tests.map((name) => join(out, name.replace(/\.ts$/, '.mjs')))
const { status } = spawnSync(process.execPath, ['--test', '--test-reporter=dot', ...files], {
  stdio: 'inherit',
})
rmSync(out, { recursive: true })
process.exit(status ?? 1)
